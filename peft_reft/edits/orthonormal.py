"""Orthonormal rows."""

from typing import Any

import torch

from ..transforms import sees_operations

# Kinds of devices that compute in float64. Others may not, as Apple's MPS and some of Intel's GPUs.
WITH_FLOAT64 = {"cpu", "cuda", "meta"}


def orthonormal_rows(weight: torch.Tensor) -> torch.Tensor:
    """Orthonormalise the rows of a matrix, the first row first (Gram-Schmidt, computed by Cholesky-QR).

    A matrix whose rows are orthonormal already comes back as it was, up to rounding, so the parameter that is stored
    and the matrix that is used agree. A row that depends on those before it to 1e-6 of its length comes back shorter,
    down to zero, with a gradient that is large but finite.

    Args:
        weight (`torch.Tensor` [..., r, d]): floating point, r <= d, linearly independent rows.

    Returns:
        `torch.Tensor` [..., r, d]: in float32 at least; half precision has no Cholesky, and would not hold 1e-6.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    orthonormalise = gram_schmidt if sees_operations() else GramSchmidt.apply
    return orthonormalise(weight)[0]


def inverse_factor(rows: torch.Tensor) -> torch.Tensor:
    """Return L^-1 [..., r, r], where L L^T = rows rows^T and L is lower triangular with a positive diagonal."""
    gram = rows @ rows.mT
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # Rows that depend on each other leave rounding where a pivot should be, of either sign: this makes it positive.
    # Rows of rank 1 to 5, of every shape tried, need a quarter of it at most. 1e-30 is for rows of zeros.
    shift = 20 * gram.shape[-1] * torch.finfo(gram.dtype).eps
    gram = torch.addcmul(gram, gram + 1e-30, identity, value=shift)
    inverse = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(gram).L, identity, upper=False)
    return (1 + shift) ** 0.5 * inverse  # undoes what the shift does to orthonormal rows


def gram_schmidt(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Q = L^-1 W, whose rows are orthonormal, and L^-1.

    Products and r x r factors alone, batched on every device: `torch.linalg.qr` on CUDA takes matrices of more than
    256 columns one at a time. In float64 one pass leaves 20 r 2.2e-16 cond(W)^2, which is 1e-6 where cond(W) is 2500
    and r is 8 (trained R stay below 2), and no setting that has float32 products computed in less (TF32, autocast)
    touches it.
    """
    if weight.device.type in WITH_FLOAT64:
        wide = weight.double()
        inverse = inverse_factor(wide)
        rows = inverse @ wide
    else:  # the second pass removes what the first leaves
        first = inverse_factor(weight)
        rows = first @ weight
        second = inverse_factor(rows)
        inverse, rows = second @ first, second @ rows
    return rows.to(weight.dtype), inverse.to(weight.dtype)


class GramSchmidt(torch.autograd.Function):
    """`gram_schmidt` with a derivative that needs no W: L^-1 is an output, so that derivatives of it have one, too."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, inverse = gram_schmidt(weight)
        ctx.save_for_backward(rows, inverse)
        leave_out_zeros(ctx)
        return rows, inverse

    @staticmethod
    def backward(ctx: Any, of_rows: torch.Tensor | None, of_inverse: torch.Tensor | None) -> torch.Tensor:
        """L^-T (G + M Q), M symmetric with the lower triangle of -G Q^T: as far as Q turns within its span, the turn
        that L, which stays triangular, cannot undo."""
        rows, inverse = ctx.saved_tensors
        of_rows = torch.zeros_like(rows) if of_rows is None else of_rows
        turn = -(of_rows @ rows.mT)
        if of_inverse is not None:  # in second derivatives
            turn = turn - of_inverse @ inverse.mT
        return inverse.mT @ (of_rows + (turn.tril() + turn.tril(-1).mT) @ rows)


def leave_out_zeros(ctx: Any) -> None:
    """Have `backward` be given None for an output that nothing depends on, where torch.compile does not trace it."""
    if not torch.compiler.is_compiling():
        ctx.set_materialize_grads(False)
