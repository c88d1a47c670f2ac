"""The arguments of a training script: TRL's parser, with the fields of `ReftConfig` in place of LoRA's."""

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import Field, field, fields, make_dataclass
from typing import Any, get_type_hints

from peft import PeftConfig
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available
from trl import ModelConfig, TrlParser

from .config import ReftConfig

PREFIX = "reft_"
LEARNING_RATE = 2e-3  # for standardised edits of every rank: docs/learning.md
LORA = re.compile("lora_.*|use_peft|use_rslora|use_dora")  # fields of TRL's ModelConfig
OTHERS = {f.name for f in fields(PeftConfig)} | {"base_adapters", "format"}
OWN = {f.name: f for f in fields(ReftConfig) if f.init and f.name not in OTHERS}
HINTS = get_type_hints(ReftConfig)
# How a command line says the values of a type. Values of all other types are given as JSON.
PLAIN = {
    bool: bool,
    int: int,
    float: float,
    str: str,
    str | None: str | None,
    list[int] | int | None: list[int] | None,
    list[str] | None: list[str] | None,
    list[str] | str | None: list[str] | None,
}


def argument(config_field: Field) -> tuple[str, Any, Field]:
    """Return the name, the type and the field of the argument for a field of `ReftConfig`."""
    kind, text = PLAIN.get(HINTS[config_field.name]), config_field.metadata["help"]
    factory = config_field.default_factory
    default: Any = factory() if callable(factory) else config_field.default
    if kind is None:
        default = None if default is None else json.dumps(default)
        kind, text = str | None, f"{text} As JSON."
    elif config_field.name in ("target_modules", "exclude_modules"):
        text += " One value that is no plain name is such an expression."
    metadata = {"help": text.replace("%", "%%")}
    return PREFIX + config_field.name, kind, field(default=default, metadata=metadata)


def value(name: str, given: Any) -> Any:
    """Return the value of a field of `ReftConfig`, given that of its argument."""
    if isinstance(given, str) and HINTS[name] not in PLAIN:
        try:
            return json.loads(given)
        except json.JSONDecodeError:
            return given
    if name in ("target_modules", "exclude_modules") and given is not None and len(given) == 1:
        return given if re.fullmatch(r"[\w.]+", given[0]) else given[0]
    return given


def peft_config(self: Any, **others: Any) -> ReftConfig:
    """Return the config that the arguments say, with other values such as `task_type`."""
    return ReftConfig(**{name: value(name, getattr(self, PREFIX + name)) for name in OWN}, **others)


# What to edit, and where: an argument for each field of `ReftConfig`, with `reft_` before its name.
ReftArguments: Any = make_dataclass(
    "ReftArguments", [argument(f) for f in OWN.values()], namespace={"peft_config": peft_config}
)


class ReftParser(TrlParser):
    """
    TRL's parser for scripts that train ReFT.

    `parse_args_and_config` returns `ReftArguments`, whose `peft_config(task_type=...)` is a [`ReftConfig`], before the
    other dataclasses. Arguments of LoRA are errors. `--help` leaves out the arguments of the training config, which
    `--help_all` lists. The default of `learning_rate` is 2e-3. `bf16` is off by default where the device does not have
    it, as on a CPU.

    Args:
        dataclass_types (`Iterable[type]`): other dataclasses, such as TRL's `ScriptArguments`, `SFTConfig` and
            `ModelConfig`.
        kwargs: as of `argparse.ArgumentParser`.
    """

    def __init__(self, dataclass_types: Iterable[type], **kwargs: Any) -> None:
        types: list[Any] = [without_lora(kind) if issubclass(kind, ModelConfig) else kind for kind in dataclass_types]
        super().__init__([ReftArguments, *types], **{"usage": "%(prog)s [arguments]"} | kwargs)
        self.training = [kind for kind in types if issubclass(kind, TrainingArguments)]
        self.add_argument("--help_all", action=HelpAll, nargs=0, help="show the arguments of the training config, too")
        if self.training:
            self.set_defaults(learning_rate=LEARNING_RATE)
        if self.training and not is_torch_bf16_gpu_available():
            self.set_defaults(bf16=False)  # TRL's default is True, which is an error there

    def format_help(self) -> str:
        left_out = {f.name for kind in self.training for f in fields(kind)}
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.start_section("arguments")
        formatter.add_arguments([action for action in self._actions if action.dest not in left_out])
        formatter.end_section()
        names = " and ".join(kind.__name__ for kind in self.training)
        formatter.add_text(
            f"The arguments of {names}, such as --output_dir, --learning_rate and --max_steps: see --help_all."
        )
        return formatter.format_help()

    def format_full_help(self) -> str:
        """Return the help text with all arguments."""
        return super().format_help()

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        namespace, unknown = super().parse_known_args(args, namespace)
        names = [name.partition("=")[0] for name in unknown if name.startswith("--")]
        lora = [name for name in names if LORA.fullmatch(name.removeprefix("--").replace("-", "_"))]
        if lora:
            self.error(
                f"{', '.join(lora)}: arguments of LoRA. This script trains ReFT: use --reft_r, --reft_positions and "
                "the others that --help lists."
            )
        return namespace, unknown


class HelpAll(argparse.Action):
    """Print the help text with all arguments."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        assert isinstance(parser, ReftParser)
        print(parser.format_full_help())
        parser.exit()


def without_lora(kind: type) -> type:
    """Return a subclass of TRL's `ModelConfig` for which a parser has no arguments of LoRA."""
    hidden = [(f.name, f.type, field(default=f.default, init=False)) for f in fields(kind) if LORA.fullmatch(f.name)]
    return make_dataclass(kind.__name__, hidden, bases=(kind,))
