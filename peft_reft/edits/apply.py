"""Apply edits to hidden states: to given tokens, and to some tokens of a batch."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from ..positions.select import Selection
from ..transforms import sees_operations
from .orthonormal import leave_out_zeros
from .variants import Matrices


class Unit(Protocol):
    """What edits hidden states: an `Intervention`, or those of the adapters of a mixed batch."""

    training: bool
    dropout: nn.Dropout

    @property
    def act_fn(self) -> Callable[[torch.Tensor], torch.Tensor] | None: ...

    @staticmethod
    def stack(units: Any) -> Matrices:
        """Return the matrices of several units of one kind, in float32 at least."""


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Return a context in which an edit is computed in its own dtype."""
    kind = "cpu" if device.type == "meta" else device.type  # there is no autocast for meta
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


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
    """Return zero where a mask [n, tokens, 1] is false. A low-rank edit costs less to mask than hidden states."""
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
        dtype = torch.promote_types(hidden_states.dtype, matrices.projection.dtype)
        projection, weight, subtracted, b = matrices.to(dtype)
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


class TakeRows(torch.autograd.Function):
    """Take some tokens out, and what is left, into which `PutRows` must put them back.

    Together they copy the hidden states once on the way forward, and their gradient once on the way back: that of what
    is left is right but at the tokens that were taken, where that of these belongs.
    """

    @staticmethod
    def forward(
        hidden_states: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden_states[rows, columns], hidden_states.view_as(hidden_states)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, of_taken: torch.Tensor, of_left: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return of_left.index_put(ctx.saved_tensors, of_taken), None, None


class PutRows(torch.autograd.Function):
    """Put tokens that `TakeRows` has taken back into what it has left."""

    @staticmethod
    def forward(left: torch.Tensor, taken: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return left.index_put((rows, columns), taken)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        return gradient, gradient[ctx.saved_tensors], None, None


def edit_rows(hidden_states: torch.Tensor, units: Mapping[str, Unit], selection: Selection) -> torch.Tensor:
    """Edit some tokens: take them, edit, put back.

    Args:
        hidden_states (`torch.Tensor` [batch, tokens, d]): all tokens.
        units (`Mapping[str, Unit]`): the adapter's units by name.
        selection (`Selection`): the tokens that some of them edit.
    """
    own = [units[name] for name in selection.units]
    if selection.indices is None:
        return edit(own, hidden_states.unsqueeze(0), selection.mask).squeeze(0)
    if sees_operations():
        return hidden_states.index_put(selection.indices, edit(own, hidden_states[selection.indices], selection.mask))
    taken, left = TakeRows.apply(hidden_states, *selection.indices)
    return PutRows.apply(left, edit(own, taken, selection.mask), *selection.indices)
