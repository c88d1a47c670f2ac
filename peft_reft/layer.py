"""`ReftLayer`: the adapters of one module whose output is edited."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import ReftConfig, find_activation
from .edits.apply import Unit, edit_rows
from .edits.intervention import Intervention
from .edits.scale import UNMEASURED, measure_exponents
from .edits.variants import VARIANTS
from .positions.language import AnyPositions, Positions
from .positions.select import Selection

# The keys of an adapter's tensors are [module]._reft._reft_[unit].[adapter]._[tensor]. Their parts begin with an
# underscore, as names of adapters rarely do: PEFT does not save keys that have the name of another adapter in them.
LAYER = "_reft"  # the child: without the prefix "reft_", or PEFT would skip it where it sets and deletes adapters
SLOT = "_reft_"  # with the prefix, and the only part that has it, or transformers would rename another
UNITS = ("unit", "prefix", "suffix")

SAVED_WITHOUT = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # of FSDP1, of activation checkpointing
COMPILED = "_orig_mod"  # torch.compile(module) has the module as this child, which state dicts name
WRAPPERS = (*SAVED_WITHOUT, COMPILED)

CANNOT_MERGE = (
    "ReFT edits hidden states at some positions, which no weight of the base model can express: it cannot be merged. "
    "Keep the adapter beside the model, in use as in storage: PeftModel.from_pretrained(base, adapter) loads it, "
    "model.disable_adapter() and model.unload() give the base model."
)


class CallEdits(Protocol):
    """What a layer needs to know of a call of its model (`runtime.plan.Plan`)."""

    def edits(self, layer: "ReftLayer") -> Iterable[tuple[AnyPositions, Mapping[str, Unit]]]:
        """Yield the choices of positions that are edited in a layer, each with its units by name."""

    def rows(
        self, positions: AnyPositions, units: tuple[str, ...], batch: int, tokens: int, device: torch.device
    ) -> list[Selection]:
        """Return the tokens that each unit edits."""

    def counted(self, batch: int, tokens: int, device: torch.device) -> torch.Tensor:
        """Mark the tokens [batch, tokens] that tell the scale of hidden states."""


class ReftLayer(nn.Module, BaseTunerLayer):
    """The adapters of one module. It is a child of that module, and a hook of the module calls it.

    Args:
        d (`int`): width of the hidden states that the module puts out.
        architecture (`str`): what transformers calls the model that the module is part of, which tells their layout.
    """

    adapter_layer_names = tuple(f"{SLOT}{unit}" for unit in UNITS)
    other_param_names = ("positions",)

    def __init__(self, d: int, architecture: str = ""):
        super().__init__()
        self.d, self.architecture = d, architecture
        self._reft_unit = nn.ModuleDict()  # one unit for all positions of an adapter
        self._reft_prefix = nn.ModuleDict()  # or one for the first tokens
        self._reft_suffix = nn.ModuleDict()  # and one for the last
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
            options: Any = (config.dropout, find_activation(config.act_fn), config.standardize)
            intervention = Intervention(VARIANTS[config.intervention], self.d, r, *options)
            if is_drawn:
                intervention.reset_parameters(config.init_weights)
            else:
                for parameter in intervention.parameters():
                    nn.init.zeros_(parameter)
            self._share_scale(intervention)
            getattr(self, f"{SLOT}{unit}")[adapter_name] = intervention
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _share_scale(self, unit: Intervention) -> None:
        """Give a new unit the scale that an active adapter has measured here.

        A trainer may copy that adapter's parameters into the new one (TRL's reference adapter), but copies no buffers.
        """
        names = dict.fromkeys([*self.active_adapters, *self.positions])
        others = [other for name in names for other in self.units(name).values() if other.is_standardized]
        if unit.exponents is not None and others and not unit.exponents.is_meta:
            unit.exponents.copy_(others[0].exponents)  # type: ignore[arg-type]

    @torch.no_grad()
    def measure(self, hidden_states: torch.Tensor, plan: CallEdits) -> None:
        """Take the scale from hidden states [batch, tokens, d], for units that are trained for the first time."""
        units = [unit for name in self.adapters_in_use for unit in self.units(name).values() if unit.waits_for_scale]
        if not units:
            return
        if getattr(self, "_is_replica", False):
            warn_of_replicas(units)
            return
        unmeasured = torch.stack([(unit.exponents == UNMEASURED).all() for unit in units])  # type: ignore[union-attr]
        edited = torch.stack([unit()[0].any() for unit in units])
        batch, tokens = hidden_states.shape[:2]
        counted = plan.counted(batch, tokens, hidden_states.device)
        found = measure_exponents(hidden_states, counted, (unmeasured & edited).any())
        for unit, is_new in zip(units, unmeasured, strict=True):
            exponents: torch.Tensor = unit.exponents  # type: ignore[assignment]
            exponents.copy_(torch.where(is_new, found, exponents))
            unit.waits_for_scale = False

    def units(self, adapter_name: str) -> dict[str, Intervention]:
        """Return the units of an adapter by name: `"unit"`, or `"prefix"` and `"suffix"`."""
        slots: dict[str, Any] = {"unit": self._reft_unit, "prefix": self._reft_prefix, "suffix": self._reft_suffix}
        return {slot: units[adapter_name] for slot, units in slots.items() if adapter_name in units}

    @property
    def adapters_in_use(self) -> list[str]:
        """The names of the active adapters that this layer has, none if adapters are disabled."""
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in self.positions]

    @property
    def edits_answers(self) -> bool:
        """Whether any adapter, active or not, edits tokens outside of prompts."""
        return any(positions.span == "all" for positions in self.positions.values())

    def forward(self, hidden_states: torch.Tensor, plan: CallEdits) -> torch.Tensor:
        """Edit what the module put out.

        Args:
            hidden_states (`torch.Tensor` [batch, tokens, d]): the module's output.
            plan (`CallEdits`): the call that it belongs to.

        Returns:
            `torch.Tensor` [batch, tokens, d]: the same but at the edited tokens.
        """
        if self.training:
            self.measure(hidden_states, plan)
        for positions, units in plan.edits(self):
            batch, tokens = hidden_states.shape[:2]
            rows = plan.rows(positions, tuple(units), batch, tokens, hidden_states.device)
            for some in rows:
                hidden_states = edit_rows(hidden_states, units, some)
        return hidden_states

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(CANNOT_MERGE)

    def unmerge(self) -> None:
        raise ValueError(CANNOT_MERGE)

    def __repr__(self) -> str:
        return "reft." + super().__repr__()


def warn_of_replicas(units: Sequence[Intervention]) -> None:
    """Warn that the copies of `nn.DataParallel`, which live for a call, cannot keep a scale for these units."""
    if any(unit.exponents is not None and unit.exponents.eq(UNMEASURED).all() for unit in units):
        warnings.warn(
            "nn.DataParallel cannot measure the scale of hidden states, so this adapter is trained in their own "
            "units, which need a lower learning rate. Start one process a device: accelerate launch, or torchrun.",
            stacklevel=2,
        )


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module that `torch.compile(module)` has compiled, or a module that is not compiled itself."""
    return module._modules.get(COMPILED) or module


def plain_name(name: str, wrappers: tuple[str, ...] = WRAPPERS) -> str:
    """Return the name of a module or parameter without the names of wrappers."""
    return ".".join(part for part in name.split(".") if part not in wrappers)


def layer_of(module: nn.Module) -> ReftLayer | None:
    """Return the `ReftLayer` of a module, or None if it has none."""
    layer = module._modules.get(LAYER)
    return layer if isinstance(layer, ReftLayer) else None


def base_modules(
    module: nn.Module, name: str = "", seen: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the named modules of a model, except those within `ReftLayer`s."""
    seen = set() if seen is None else seen
    if module in seen:
        return
    seen.add(module)
    yield name, module
    for own, child in module._modules.items():
        if child is not None and not isinstance(child, ReftLayer):
            yield from base_modules(child, f"{name}.{own}" if name else own, seen)


def adapted_modules(model: nn.Module) -> dict[str, tuple[nn.Module, ReftLayer]]:
    """Return the modules of a model that have a `ReftLayer`, and that layer, by name."""
    return {name: (module, layer) for name, module in base_modules(model) if (layer := layer_of(module)) is not None}
