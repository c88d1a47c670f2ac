"""Orthonormal rows."""

import torch


def orthonormal_rows(weight: torch.Tensor) -> torch.Tensor:
    """Orthonormalise the rows of a matrix, the first row first (Gram-Schmidt, computed by Householder QR).

    A matrix whose rows are orthonormal already comes back as it was, up to rounding, so the parameter that is stored
    and the matrix that is used agree. The signs of QR are undone: otherwise a row would flip as an entry crosses zero.

    Args:
        weight (`torch.Tensor` [..., r, d]): floating point, r <= d, linearly independent rows.

    Returns:
        `torch.Tensor` [..., r, d]: in float32 at least; half precision has no QR, and would not hold 1e-6.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    q, upper = torch.linalg.qr(weight.mT)  # [..., d, r], [..., r, r]
    signs = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    return (q * signs.unsqueeze(-2)).mT
