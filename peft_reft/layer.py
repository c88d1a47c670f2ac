"""`ReftLayer`: the adapters of one module whose output is edited."""

from collections.abc import Callable, Iterator, Mapping

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import VARIANTS, ReftConfig
from .intervention import Intervention
from .plan import Plan
from .positions import AnyPositions, Positions

Unit = Callable[[torch.Tensor], torch.Tensor]  # edits hidden states [batch, n, d]

LAYER = "reft"  # the child's name: without the prefix, or PEFT would skip it where it sets and deletes adapters

CANNOT_MERGE = (
    "ReFT edits hidden states at some positions, which no weight of the base model can express: it cannot be merged. "
    "Keep the adapter beside the model, in use as in storage: PeftModel.from_pretrained(base, adapter) loads it, "
    "model.disable_adapter() and model.unload() give the base model."
)


class ReftLayer(nn.Module, BaseTunerLayer):
    """A child of the module that it adapts, with adapter parameters alone; a hook of that module calls it.

    Args:
        d (`int`): width of the hidden states that the module puts out.
        architecture (`str`): what transformers calls the model that the module is part of, which tells their layout.
    """

    adapter_layer_names = ("reft_unit", "reft_prefix", "reft_suffix")
    other_param_names = ("positions",)

    def __init__(self, d: int, architecture: str = ""):
        super().__init__()
        self.d, self.architecture = d, architecture
        self.reft_unit = nn.ModuleDict()  # one unit for all positions of an adapter
        self.reft_prefix = nn.ModuleDict()  # or one for the first tokens
        self.reft_suffix = nn.ModuleDict()  # and one for the last
        self.positions: dict[str, Positions] = {}
        self.merged_adapters = []

    @property
    def weight(self) -> torch.Tensor:
        # BaseTunerLayer would look for it in the base layer that this layer does not wrap.
        raise AttributeError("A ReftLayer has no weight: it edits what a module puts out, and wraps none.")

    bias = weight

    def update_layer(self, adapter_name: str, r: int, config: ReftConfig, is_drawn: bool = True) -> None:
        """Add an adapter of rank `r`; of zeros unless `is_drawn`, for a checkpoint to be put in their place."""
        positions = Positions.parse(config.positions)
        self.positions[adapter_name] = positions
        for unit in positions.units(config.share_weights):
            intervention = Intervention(VARIANTS[config.intervention], self.d, r, config.dropout, config.act_fn)
            if is_drawn:
                intervention.reset_parameters(config.init_weights)
            else:
                for parameter in intervention.parameters():
                    nn.init.zeros_(parameter)
            getattr(self, f"reft_{unit}")[adapter_name] = intervention
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def units(self, adapter_name: str) -> dict[str, Intervention]:
        """The units of an adapter by name: `"unit"`, or `"prefix"` and `"suffix"`."""
        units = (name.removeprefix("reft_") for name in self.adapter_layer_names)
        return {
            unit: getattr(self, f"reft_{unit}")[adapter_name]
            for unit in units
            if adapter_name in getattr(self, f"reft_{unit}")
        }

    @property
    def adapters_in_use(self) -> list[str]:
        """The names of the active adapters that this layer has, none if adapters are disabled."""
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in self.positions]

    def is_used_by(self, plan: Plan | None) -> bool:
        """Whether a call has adapters to run here; one whose plan is not known has the active ones."""
        if plan is None or plan.mixed_batch is None:
            return bool(self.adapters_in_use)
        return not self.disable_adapters and any(name in self.positions for name in plan.mixed_batch.names)

    def edits(self, plan: Plan) -> Iterator[tuple[AnyPositions, Mapping[str, Unit]]]:
        """The choices of positions that are edited in a call, one after the other, each with its units by name."""
        if plan.mixed_batch is None:
            yield from ((self.positions[name], self.units(name)) for name in self.adapters_in_use)
        else:
            yield plan.mixed_batch.edits(self, self.positions, self.units)

    def forward(self, hidden_states: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Edit what the module put out.

        Args:
            hidden_states (`torch.Tensor` [batch, tokens, d]): the module's output.
            plan (`Plan`): the call that it belongs to.

        Returns:
            `torch.Tensor` [batch, tokens, d]: the same but at the edited tokens.
        """
        for positions, units in self.edits(plan):
            batch, tokens = hidden_states.shape[:2]
            rows = plan.rows(positions, tuple(units), batch, tokens, hidden_states.device)
            for unit, (indices, mask) in (rows or {}).items():
                hidden_states = edit_rows(hidden_states, units[unit], indices, mask)
        return hidden_states

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(CANNOT_MERGE)

    def unmerge(self) -> None:
        raise ValueError(CANNOT_MERGE)

    def __repr__(self) -> str:
        return "reft." + super().__repr__()


def layer_of(module: nn.Module) -> ReftLayer | None:
    """The `ReftLayer` of a module, or None if it has none."""
    layer = module._modules.get(LAYER)
    return layer if isinstance(layer, ReftLayer) else None


def adapted_modules(model: nn.Module) -> dict[str, tuple[nn.Module, ReftLayer]]:
    """The modules of a model that have a `ReftLayer`, with it, by name."""
    return {name: (module, layer) for name, module in model.named_modules() if (layer := layer_of(module)) is not None}


def edit_rows(
    hidden_states: torch.Tensor, unit: Unit, indices: torch.Tensor | None, mask: torch.Tensor | None
) -> torch.Tensor:
    """Edit some tokens: take them, edit, put back. The arguments are those of `Rows`."""
    where = None
    if indices is not None:
        where = torch.arange(len(indices), device=indices.device).unsqueeze(-1), indices  # [batch, 1], [batch, n]
    # Not by `gather`, which would keep all hidden states for the backward pass.
    before = hidden_states if where is None else hidden_states[where]  # [batch, n, d]
    after = unit(before)
    if mask is not None:
        after = torch.where(mask.unsqueeze(-1), after, before)
    return after if where is None else hidden_states.index_put(where, after)
