"""The family of ReFT interventions: one module with three switches."""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN

from .config import Variant
from .orthogonal import orthonormal_rows


def without_autocast(device: torch.device) -> torch.autocast:
    """A context in which an edit is computed in the dtype that it chooses."""
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)  # there is none for meta


def projections(weight: torch.Tensor, orthonormal: bool) -> torch.Tensor:
    """The projections that are used for trained `R` [..., r, d], in float32 at least."""
    if orthonormal:
        return orthonormal_rows(weight)
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def low_rank_edit(
    h: torch.Tensor,
    projection: torch.Tensor,
    weight: torch.Tensor | None,
    b: torch.Tensor,
    act_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
    subtracted: torch.Tensor | None = None,
) -> torch.Tensor:
    """h + projection^T (act_fn(weight h + b) - subtracted h).

    Args:
        h (`torch.Tensor` [..., n, d]): hidden states.
        projection, weight, subtracted (`torch.Tensor` [..., r, d]): of the same dtype as `h`; None for zero.
        b (`torch.Tensor` [r] or [..., 1, r]): the bias.
        act_fn (*optional*): the identity if None.

    Returns:
        `torch.Tensor` [..., n, d]
    """
    low_rank = b if weight is None else h @ weight.mT + b
    if act_fn is not None:
        low_rank = act_fn(low_rank)
    if subtracted is not None:
        low_rank = low_rank - h @ subtracted.mT
    return h + low_rank @ projection


class Intervention(nn.Module):
    """One unit: h' = h + edit(h), with edit(h) = R^T (s(h) - R h) in LoReFT (arXiv 2404.03592, equation 2).

    `R` holds what is trained and saved. Where the variant asks for orthonormal rows, the projection that is used is
    `orthonormal_rows(R)`.

    Args:
        variant (`Variant`): the three switches.
        d (`int`): width of the hidden states.
        r (`int`): rank of the edit, 1 <= r <= d.
        dropout (`float`): probability of a zero in the edited hidden state, in training.
        act_fn (`str`, *optional*): a name from `transformers.activations.ACT2FN`; the identity if None.
    """

    def __init__(self, variant: Variant, d: int, r: int, dropout: float = 0.0, act_fn: str | None = None):
        super().__init__()
        self.variant, self.d, self.r = variant, d, r
        self.R = nn.Parameter(torch.empty(r, d, dtype=torch.float32))
        self.W = nn.Parameter(torch.empty(r, d, dtype=torch.float32)) if variant.linear else None
        self.b = nn.Parameter(torch.empty(r, dtype=torch.float32))
        self.dropout = nn.Dropout(dropout)
        self.activation = act_fn if variant.linear else None  # a constant source has none
        self.act_fn: Callable[[torch.Tensor], torch.Tensor] | None = (
            ACT2FN[self.activation] if self.activation else None
        )
        self._kept: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def reset_parameters(self, init_weights: bool | str) -> None:
        """Draw the parameters anew.

        Args:
            init_weights (`bool` or `str`): True for an edit that is zero where the variant allows it: W = R where R h
                is subtracted, W = 0 where it is not, and b = 0. "reference" for the draws of pyreft. False for a
                random edit that is not zero, to test with.
        """
        if self.b.is_meta:  # there is nothing to draw, only work that is done for it
            return
        if self.variant.orthonormal:
            nn.init.orthogonal_(self.R)
        else:
            nn.init.kaiming_uniform_(self.R, a=math.sqrt(5))  # as nn.Linear
        bound = 1 / math.sqrt(self.R.shape[1])
        if init_weights is True:
            nn.init.zeros_(self.b)
            if self.W is not None:
                self.W.copy_(self.projection() if self.variant.subtract else torch.zeros_like(self.W))
        elif init_weights == "reference":
            if self.W is None:
                nn.init.uniform_(self.b)  # as torch.rand
            else:
                nn.init.kaiming_uniform_(self.W, a=math.sqrt(5))
                nn.init.uniform_(self.b, -bound, bound)
        else:
            nn.init.normal_(self.b)
            if self.W is not None:
                nn.init.normal_(self.W, std=bound)

    def keep_dtype(self) -> None:
        """Remember the parameters as they are now, so that `restore_dtype` can undo what else casts them."""
        self._kept = {name: parameter.data for name, parameter in self.named_parameters()}  # no copies

    def restore_dtype(self) -> None:
        """Undo a cast of the parameters, exactly where their values have not changed since."""
        for name, kept in self._kept.items():
            parameter = self.get_parameter(name)
            if parameter.dtype != kept.dtype:
                is_cast = not kept.is_meta and torch.equal(kept.to(parameter), parameter)
                parameter.data = kept.to(parameter.device) if is_cast else parameter.data.to(kept.dtype)
        self._kept = {}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Intervention":
        dtypes, kept = [p.dtype for p in self.parameters()], bool(self._kept)
        super()._apply(fn, recurse)
        self._kept = {}  # half(), to(dtype) and the like say what is wanted
        if kept and dtypes == [p.dtype for p in self.parameters()]:  # moved
            self.keep_dtype()
        return self

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes that its tensors have when they are whole, whatever of them lies on this device."""
        shapes: dict[str, tuple[int, ...]] = {"R": (self.r, self.d), "W": (self.r, self.d), "b": (self.r,)}
        return shapes if self.variant.linear else {name: shapes[name] for name in ("R", "b")}

    def projection(self) -> torch.Tensor:
        """The projection R [r, d] that is used, in float32 at least."""
        return projections(self.R, self.variant.orthonormal)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Edit hidden states.

        Args:
            hidden_states (`torch.Tensor` [..., d]): any floating-point dtype.

        Returns:
            `torch.Tensor` [..., d]: h', in the dtype of `hidden_states`, computed in float32 at least.
        """
        with without_autocast(hidden_states.device):
            projection = self.projection()
            dtype = torch.promote_types(hidden_states.dtype, projection.dtype)
            h, projection, b = hidden_states.to(dtype), projection.to(dtype), self.b.to(dtype)
            weight, subtracted = None if self.W is None else self.W.to(dtype), None
            if self.variant.subtract and self.act_fn is not None:
                subtracted = projection
            elif self.variant.subtract:  # in one product, so that W = R makes the edit exactly zero
                weight = -projection if weight is None else weight - projection
            edited = low_rank_edit(h, projection, weight, b, self.act_fn, subtracted)
            return self.dropout(edited).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"r={self.r}, d={self.d}, {self.variant}"
