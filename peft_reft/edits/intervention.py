"""The family of ReFT interventions: one module with three switches."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from ..config import Variant, find_activation, standardized_form
from ..transforms import sees_operations
from .orthonormal import leave_out_zeros, orthonormal_rows
from .scale import UNMEASURED, scale_of

# What h + projection^T (act_fn(weight h + b) - subtracted h) needs of n units: projection, weight and subtracted
# [n, r, d], of which the latter two are None for zero, and b [n, 1, r]
Matrices = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]


# Of the rows of R that are drawn. The paper's learning rates are for Householder reflections (torch's `orthogonal`),
# which turn by twice the angle of their vectors; shorter rows turn as far. docs/results.md has the losses.
LENGTH = 0.5


# A standardised edit is sqrt(8 / r) times as large as its parameters say, so that one learning rate serves every rank.
STANDARD_RANK = 8


def standard_factor(r: int) -> float:
    """Return what the edit of a standardised unit of rank r is multiplied by."""
    return math.sqrt(STANDARD_RANK / r)


class Unit(Protocol):
    """What edits hidden states: an `Intervention`, or those of the adapters of a mixed batch."""

    training: bool
    dropout: nn.Dropout

    @property
    def act_fn(self) -> Callable[[torch.Tensor], torch.Tensor] | None: ...

    @staticmethod
    def stack(units: Any) -> Matrices:
        """The matrices of several of the same kind, one after the other, in float32 at least."""


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which an edit is computed in the dtype that it chooses."""
    kind = "cpu" if device.type == "meta" else device.type  # there is no autocast for meta
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def projections(weight: torch.Tensor, orthonormal: bool) -> torch.Tensor:
    """The projections that are used for trained `R` [..., r, d], in float32 at least."""
    if orthonormal:
        return orthonormal_rows(weight)
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


class Intervention(nn.Module):
    """One unit: h' = h + edit(h), with edit(h) = R^T (s(h) - R h) in LoReFT (arXiv 2404.03592, equation 2).

    `R` holds what is trained and saved. Where the variant asks for orthonormal rows, the projection that is used is
    `orthonormal_rows(R)`.

    A standardised unit is trained in units of the scale s [d] of hidden states: its edit is that
    of sqrt(8 / r) R * s and W / s.

    Args:
        variant (`Variant`): the three switches, of which a standardised unit may use others for the same edits.
        d (`int`): width of the hidden states.
        r (`int`): rank of the edit, 1 <= r <= d.
        dropout (`float`): probability of a zero in the edited hidden state, in training.
        act_fn (`str`, *optional*): a name from `transformers.activations.ACT2FN`; the identity if None.
        standardize (`bool`): whether the unit is standardised, where the variant allows it.
    """

    _exponents: torch.Tensor | None

    def __init__(
        self,
        variant: Variant,
        d: int,
        r: int,
        dropout: float = 0.0,
        act_fn: str | None = None,
        standardize: bool = False,
    ):
        super().__init__()
        form = standardized_form(variant, act_fn) if standardize else None
        self.is_standardized = form is not None
        self.waits_for_scale = self.is_standardized  # until the first training call in this process
        self.configured, self.variant, self.d, self.r = variant, form or variant, d, r
        unmeasured = torch.full((d,), UNMEASURED, dtype=torch.int8) if self.is_standardized else None
        self.register_buffer("_exponents", unmeasured)
        self._R = nn.Parameter(torch.empty(r, d, dtype=torch.float32))
        self._W = nn.Parameter(torch.empty(r, d, dtype=torch.float32)) if variant.linear else None
        self._b = nn.Parameter(torch.empty(r, dtype=torch.float32))
        self.dropout = nn.Dropout(dropout)
        self.activation = act_fn if variant.linear else None  # a constant source has none
        self.act_fn = find_activation(self.activation)
        self._kept: dict[str, torch.Tensor] = {}
        self._kept_exponents = unmeasured

    # The parameters' own names begin with an underscore: they are parts of the keys of state dicts (layer.py).

    @property
    def R(self) -> nn.Parameter:
        return self._R

    @property
    def W(self) -> nn.Parameter | None:
        return self._W

    @property
    def b(self) -> nn.Parameter:
        return self._b

    @property
    def exponents(self) -> torch.Tensor | None:
        """Those of the scale (`torch.CharTensor` [d]), -128 until it is measured; None if not standardised."""
        return self._exponents

    @torch.no_grad()
    def reset_parameters(self, init_weights: bool | str) -> None:
        """Draw the parameters anew.

        Args:
            init_weights (`bool` or `str`): True for an edit that is zero where the variant allows it: R = 0 in a
                standardised unit; else W = R where R h is subtracted, W = 0 where it is not; and b = 0. "reference"
                for the draws of pyreft. False for a random edit that is not zero, to test with.
        """
        if self.b.is_meta:  # there is nothing to draw, only work that is done for it
            return
        if self.is_standardized and init_weights is True:
            nn.init.zeros_(self.R)
            nn.init.orthogonal_(self.W)  # type: ignore[arg-type]
            nn.init.zeros_(self.b)
            return
        if self.configured.orthonormal:
            nn.init.orthogonal_(self.R, gain=LENGTH)
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
            if self.is_standardized:
                self._standardize_drawn()

    def _standardize_drawn(self) -> None:
        """Make the drawn parameters those of the same edit in units of a scale of one."""
        projection = projections(self.R, self.configured.orthonormal)
        if self.configured.subtract and not self.variant.subtract:
            self.W.sub_(projection)  # type: ignore[union-attr]
        self.R.copy_(projection / standard_factor(self.r))

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
        dtypes, kept, exponents = [p.dtype for p in self.parameters()], bool(self._kept), self._exponents
        super()._apply(fn, recurse)
        if self.b.is_meta and exponents is not None and not exponents.is_meta:
            self._kept_exponents = exponents  # see _save_to_state_dict
        self._kept = {}  # half(), to(dtype) and the like say what is wanted
        if kept and dtypes == [p.dtype for p in self.parameters()]:  # moved
            self.keep_dtype()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Leave the exponents out if the parameters are on the meta device.

        For FSDP2, accelerate moves the model there, and shards all that the state dict has: buffers cannot be.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.b.is_meta:
            destination.pop(f"{prefix}_exponents", None)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *others: Any
    ) -> None:
        """Keep the exponents if they are not given."""
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *others)
        if f"{prefix}_exponents" in missing:
            missing.remove(f"{prefix}_exponents")
            if self._exponents.is_meta and not self.b.is_meta:  # type: ignore[union-attr]
                self._exponents = self._kept_exponents.to(self.b.device)  # type: ignore[union-attr]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes that its tensors have when they are whole, whatever of them lies on this device."""
        shapes: dict[str, tuple[int, ...]] = {"R": (self.r, self.d), "b": (self.r,)}
        if self.variant.linear:
            shapes["W"] = (self.r, self.d)
        if self.is_standardized:
            shapes["exponents"] = (self.d,)
        return shapes

    def projection(self) -> torch.Tensor:
        """The projection R [r, d] that is used, in float32 at least."""
        return projections(self.R, self.variant.orthonormal)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Copies of `R`, `W` and `b`: FSDP and ZeRO gather the parameters for the time of this call alone."""
        return self.R.clone(), None if self.W is None else self.W.clone(), self.b.clone()

    @staticmethod
    def stack(units: Sequence["Intervention"]) -> Matrices:
        """The matrices of units of one adapter, in float32 at least."""
        rows, weights, b = zip(*(unit() for unit in units), strict=True)
        variant, subtracted = units[0].variant, None
        projection = projections(stack(rows), variant.orthonormal)
        weight = stack(weights).to(projection.dtype) if variant.linear else None
        if units[0].is_standardized:
            projection, weight = in_units_of_states(projection, weight, units)
        if variant.subtract and units[0].act_fn is not None:
            subtracted = projection
        elif variant.subtract:  # in one product, so that W = R makes the edit exactly zero
            weight = -projection if weight is None else weight - projection
        return projection, weight, subtracted, stack(b).to(projection.dtype).unsqueeze(1)

    def extra_repr(self) -> str:
        return f"r={self.r}, d={self.d}, {self.variant}"


def in_units_of_states(
    projection: torch.Tensor, weight: Any, units: Sequence[Intervention]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrices [units, r, d] of standardised units of one rank, in the units of the hidden states."""
    exponents: Any = stack([unit.exponents for unit in units])  # type: ignore[misc]
    scale = scale_of(exponents).to(projection.dtype).unsqueeze(1)
    return projection * (scale * standard_factor(units[0].r)), weight / scale


def stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.stack`, without a copy of a single one."""
    return torch.stack(tuple(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)


def cast(matrices: Matrices, dtype: torch.dtype) -> Matrices:
    """Matrices in another dtype."""
    projection, weight, subtracted, b = matrices
    weight, subtracted = (None if matrix is None else matrix.to(dtype) for matrix in (weight, subtracted))
    return projection.to(dtype), weight, subtracted, b.to(dtype)


class LinearEdit(torch.autograd.Function):
    """h + projection^T s in the dtype of h, and s = weight h + b, zero where a mask is false, in that of the matrices.

    Besides the matrices it keeps h as it was given, not as it was computed with: half as much in half precision. What
    else it keeps, s, is an output, so that derivatives of its derivative have one, too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        given: torch.Tensor,
        projection: torch.Tensor,
        weight: torch.Tensor,
        b: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        h = given.to(projection.dtype)
        low_rank = masked(torch.baddbmm(b, h, weight.mT), mask)
        ctx.save_for_backward(given, projection, weight, mask, low_rank)
        leave_out_zeros(ctx)
        return torch.baddbmm(h, low_rank, projection).to(given.dtype), low_rank

    @staticmethod
    def backward(
        ctx: Any, of_edited: torch.Tensor | None, of_low_rank: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        given, projection, weight, mask, low_rank = ctx.saved_tensors
        wide = (torch.zeros_like(given) if of_edited is None else of_edited).to(projection.dtype)
        of_source = wide @ projection.mT
        if of_low_rank is not None:  # in second derivatives
            of_source = of_source + of_low_rank
        of_source = masked(of_source, mask)
        of_given = torch.baddbmm(wide, of_source, weight).to(given.dtype) if ctx.needs_input_grad[0] else None
        of_weight = of_source.mT @ given.to(projection.dtype)
        return of_given, low_rank.mT @ wide, of_weight, of_source.sum(1, keepdim=True), None


def masked(low_rank: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Zero where a mask [n, tokens, 1] is false: here, where edits are narrow."""
    return low_rank if mask is None else torch.where(mask, low_rank, 0)


def edit(units: Sequence[Unit], hidden_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Edit hidden states, each part by a unit of its own, all of one adapter or of one mixed batch.

    Args:
        units (`Sequence[Unit]`): the units.
        hidden_states (`torch.Tensor` [units, batch, n, d]): any floating-point dtype.
        mask (`torch.BoolTensor` [units, batch, n], *optional*): the tokens to edit; None for all.

    Returns:
        `torch.Tensor` [units, batch, n, d]: h', in the dtype of `hidden_states`, computed in float32 at least.
    """
    act_fn, dropout = units[0].act_fn, units[0].dropout
    with without_autocast(hidden_states.device):
        matrices = units[0].stack(units)
        projection, weight, subtracted, b = cast(matrices, torch.promote_types(hidden_states.dtype, matrices[0].dtype))
        given = hidden_states.reshape(len(projection), -1, hidden_states.shape[-1])
        mask = None if mask is None else mask.reshape(*given.shape[:-1], 1)
        if act_fn is None and weight is not None and not sees_operations():
            edited, _ = LinearEdit.apply(given, projection, weight, b, mask)
        else:
            h = given.to(projection.dtype)
            low_rank = b.expand(-1, h.shape[1], -1) if weight is None else torch.baddbmm(b, h, weight.mT)
            low_rank = low_rank if act_fn is None else act_fn(low_rank)
            if subtracted is not None:
                low_rank = torch.baddbmm(low_rank, h, subtracted.mT, alpha=-1)
            edited = torch.baddbmm(h, masked(low_rank, mask), projection).to(given.dtype)
        if units[0].training and dropout.p:
            edited = dropout(edited) if mask is None else torch.where(mask, dropout(edited), edited)
        return edited.view_as(hidden_states)
