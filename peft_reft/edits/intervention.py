"""The family of ReFT interventions: one module with three switches."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .scale import UNMEASURED, scale_of
from .variants import Matrices, Variant, standard_factor, standardized_form

# Of the rows of R that are drawn. The paper's learning rates are for Householder reflections (torch's `orthogonal`),
# which turn by twice the angle of their vectors; shorter rows turn as far. docs/results.md has the losses.
INIT_ROW_NORM = 0.5

TENSORS = ("R", "W", "b", "exponents")  # the names of all that a unit may save


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
        act_fn (`Callable`, *optional*): the activation of a linear source; the identity if None.
        standardize (`bool`): whether the unit is standardised, where the variant allows it.
    """

    _exponents: torch.Tensor | None

    def __init__(
        self,
        variant: Variant,
        d: int,
        r: int,
        dropout: float = 0.0,
        act_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
        standardize: bool = False,
    ):
        super().__init__()
        form = standardized_form(variant, act_fn is not None) if standardize else None
        self.is_standardized = form is not None
        self.waits_for_scale = self.is_standardized  # until the first training call in this process
        self.configured, self.variant, self.d, self.r = variant, form or variant, d, r
        unmeasured = torch.full((d,), UNMEASURED, dtype=torch.int8) if self.is_standardized else None
        self.register_buffer("_exponents", unmeasured)
        self._R = nn.Parameter(torch.empty(r, d, dtype=torch.float32))
        self._W = nn.Parameter(torch.empty(r, d, dtype=torch.float32)) if variant.linear else None
        self._b = nn.Parameter(torch.empty(r, dtype=torch.float32))
        self.dropout = nn.Dropout(dropout)
        self.act_fn = act_fn if variant.linear else None
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
        """The exponents of the scale (`torch.CharTensor` [d]): -128 until it is measured, None if not standardised."""
        return self._exponents

    @torch.no_grad()
    def reset_parameters(self, init_weights: bool | str) -> None:
        """Draw new parameters.

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
            nn.init.orthogonal_(self.R, gain=INIT_ROW_NORM)
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
        projection = self.configured.projection(self.R)
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
        """Return the full shapes of the tensors, however they are sharded."""
        shapes: dict[str, tuple[int, ...]] = {"R": (self.r, self.d), "b": (self.r,)}
        if self.variant.linear:
            shapes["W"] = (self.r, self.d)
        if self.is_standardized:
            shapes["exponents"] = (self.d,)
        return shapes

    def projection(self) -> torch.Tensor:
        """Return the projection R [r, d] that is used, in float32 at least."""
        return self.variant.projection(self.R)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Return copies of `R`, `W` and `b`. FSDP and ZeRO gather the parameters only during this call."""
        return self.R.clone(), None if self.W is None else self.W.clone(), self.b.clone()

    @staticmethod
    def stack(units: Sequence["Intervention"]) -> Matrices:
        """Return the matrices of units of one adapter, in float32 at least."""
        R, W, b = (
            None if parts[0] is None else stack(parts) for parts in zip(*(unit() for unit in units), strict=True)
        )
        exponents: Any = [unit.exponents for unit in units]
        scale = scale_of(stack(exponents)) if units[0].is_standardized else None
        return units[0].variant.matrices(R, W, b, scale, units[0].act_fn is not None)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"r={self.r}, d={self.d}, {self.variant}"


def stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack tensors. A single tensor is not copied."""
    return torch.stack(tuple(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)
