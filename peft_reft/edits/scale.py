"""The scale of hidden states: the unit in which a standardised edit is trained.

In nearly every layer of a language model a few dimensions are hundreds of times larger than the others. One learning
rate cannot serve them all, so each dimension gets a unit of its own: its root mean square, as a power of two.
"""

import torch

from .orthonormal import WITH_FLOAT64

UNMEASURED = torch.iinfo(torch.int8).min
SMALLEST = 2.0**-4  # of the median unit: what a dimension that is always zero gets
LARGEST_EXPONENT = 96


def scale_of(exponents: torch.Tensor) -> torch.Tensor:
    """Return the scale of exponents (`torch.CharTensor` [d]): powers of two [d] in float32, ones where unmeasured."""
    return torch.exp2(exponents.masked_fill(exponents == UNMEASURED, 0).float())


def measure_exponents(hidden_states: torch.Tensor, counted: torch.Tensor, is_edited: torch.Tensor) -> torch.Tensor:
    """Measure the scale of hidden states, over all processes.

    Args:
        hidden_states (`torch.Tensor` [batch, tokens, d]): what a module put out, of any floating-point dtype.
        counted (`torch.BoolTensor` [batch, tokens]): the tokens to measure.
        is_edited (`torch.BoolTensor` []): whether an edit is not zero, which another scale would change.

    Returns:
        `torch.CharTensor` [d]: the exponents of powers of two; zeros if an edit is not zero, or no token is counted.
    """
    wide = hidden_states.to(torch.float64 if hidden_states.device.type in WITH_FLOAT64 else torch.float32)
    counted = counted & wide.isfinite().all(-1)
    squares = torch.where(counted.unsqueeze(-1), wide, 0).square().sum((0, 1))
    sums = torch.cat([squares, counted.sum().to(wide).view(1), is_edited.to(wide).view(1)])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    squares, tokens, edited = sums[:-2], sums[-2], sums[-1]
    rms = (squares / tokens.clamp(min=1)).sqrt()
    median = torch.where(rms > 0, rms, torch.nan).nanmedian()
    exponents = rms.maximum(SMALLEST * median).log2().round().clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
    return torch.where((tokens > 0) & (edited == 0), exponents.nan_to_num(0), 0).to(torch.int8)
