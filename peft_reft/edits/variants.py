"""The family of ReFT interventions: three switches, and the matrices of the edit that they make."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .orthonormal import orthonormal_rows

# A standardised edit is sqrt(8 / r) times as large as its parameters say, so that one learning rate serves every rank.
STANDARD_RANK = 8


def standard_factor(r: int) -> float:
    """Return what the edit of a standardised unit of rank r is multiplied by."""
    return math.sqrt(STANDARD_RANK / r)


class Matrices(NamedTuple):
    """The edits of n units: h + projection^T (act_fn(weight h + b) - subtracted h).

    Attributes:
        projection (`torch.Tensor` [n, r, d]): the directions that are edited.
        weight, subtracted (`torch.Tensor` [n, r, d], *optional*): None for zero.
        b (`torch.Tensor` [n, 1, r]): the bias.
    """

    projection: torch.Tensor
    weight: torch.Tensor | None
    subtracted: torch.Tensor | None
    b: torch.Tensor

    def to(self, dtype: torch.dtype) -> "Matrices":
        """Return the matrices in another dtype."""
        return Matrices(*(None if matrix is None else matrix.to(dtype) for matrix in self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Variant:
    """The three switches of the family.

    Attributes:
        orthonormal: whether the rows of R are kept orthonormal.
        subtract: whether the projection of h is replaced (R^T (s - R h)) or added to (R^T s).
        linear: whether the source s is act(W h + b), or b alone.
    """

    orthonormal: bool
    subtract: bool
    linear: bool

    def projection(self, R: torch.Tensor) -> torch.Tensor:
        """Return the projections that are used for trained `R` [..., r, d], in float32 at least."""
        if self.orthonormal:
            return orthonormal_rows(R)
        return R.to(torch.promote_types(R.dtype, torch.float32))

    def matrices(
        self,
        R: torch.Tensor,
        W: torch.Tensor | None,
        b: torch.Tensor,
        scale: torch.Tensor | None = None,
        is_activated: bool = False,
    ) -> Matrices:
        """Return the matrices of the edits of n units, in float32 at least.

        Args:
            R, W (`torch.Tensor` [n, r, d]): the trained parameters. `W` is None if the source is constant.
            b (`torch.Tensor` [n, r]): the trained bias.
            scale (`torch.Tensor` [n, d], *optional*): the units of hidden states in which they are trained. None if
                they are trained in the hidden states' own.
            is_activated (`bool`): whether an activation follows the linear source.
        """
        projection, subtracted = self.projection(R), None
        weight = None if W is None else W.to(projection.dtype)
        if scale is not None:
            scale = scale.to(projection.dtype).unsqueeze(-2)
            projection = projection * (scale * standard_factor(R.shape[-2]))
            weight = None if weight is None else weight / scale
        if self.subtract and is_activated:
            subtracted = projection
        elif self.subtract:  # in one product, so that W = R makes the edit exactly zero
            weight = -projection if weight is None else weight - projection
        return Matrices(projection, weight, subtracted, b.to(projection.dtype).unsqueeze(-2))


# The classes are those of pyreft 0.1.0, pyreft/interventions.py.
VARIANTS = {
    "loreft": Variant(orthonormal=True, subtract=True, linear=True),  # LoreftIntervention
    "noreft": Variant(orthonormal=False, subtract=True, linear=True),  # NoreftIntervention
    "direft": Variant(orthonormal=False, subtract=False, linear=True),  # NodireftIntervention, the paper's DiReFT
    "direft_orthogonal": Variant(orthonormal=True, subtract=False, linear=True),  # DireftIntervention
    "consreft": Variant(orthonormal=True, subtract=True, linear=False),  # ConsreftIntervention
    "lobireft": Variant(orthonormal=True, subtract=False, linear=False),  # LobireftIntervention
}


def standardized_form(variant: Variant, is_activated: bool) -> Variant | None:
    """Return the variant in which a standardised edit is trained, None where the units cannot change.

    Without an activation, R^T (W h + b - R h) with orthonormal rows is any affine map of rank r, and so is
    R^T (W h + b) with free ones. Between R and R^T, an activation or a constant keeps rows orthonormal in the units
    of the hidden states.
    """
    if variant.linear and not is_activated:
        return Variant(orthonormal=False, subtract=False, linear=True)
    return variant if variant.linear and not variant.orthonormal else None
