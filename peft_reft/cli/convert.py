"""`peft-reft convert`: turn a checkpoint of another library into a PEFT adapter."""

import argparse
import sys
from typing import Any

from transformers.activations import ACT2FN

from ..convert import convert_adapters, convert_pyreft
from ..convert.save import TASKS
from ..edits.variants import VARIANTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    kinds = parser.add_subparsers(dest="source_format", required=True)
    pyreft = kinds.add_parser("pyreft", help="of pyreft: config.json with its intkey_* files")
    adapters = kinds.add_parser("adapters", help="of adapters (AdapterHub): adapter_config.json with its weights")
    for kind in (pyreft, adapters):
        kind.add_argument("source", metavar="SRC", help="folder of the checkpoint, or its id on the Hub")
        kind.add_argument("destination", metavar="DST", help="folder to write the PEFT adapter to, new or empty")
        kind.add_argument("--base-model", required=True, help="folder or Hub id; only its config is read")
        kind.add_argument(
            "--task-type", choices=TASKS, help="PEFT's task type (default: that of the base model's own class)"
        )
        kind.add_argument("--num-labels", type=int, help="of a classifier (default: those of the base model's config)")
        kind.add_argument(
            "--no-head", dest="head", action="store_false", help="leave out a head that was trained with the edits"
        )
    pyreft.add_argument("--positions", help="required: the tokens that are edited, as f7+l7; pyreft saves none")
    pyreft.add_argument(
        "--share-weights",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether first and last tokens share their weights (default: no, if a module has two interventions)",
    )
    pyreft.add_argument(
        "--first-unit",
        choices=("prefix", "suffix"),
        help="what the first of a module's two interventions edits (default: as pyreft's own locations have it)",
    )
    pyreft.add_argument(
        "--act-fn", choices=sorted(ACT2FN), metavar="NAME", help="activation of the source; pyreft does not save it"
    )
    adapters.add_argument(
        "--intervention", choices=VARIANTS, help="noreft or direft, for a projection that is not orthogonal"
    )


def run(parser: argparse.ArgumentParser, source_format: str, **options: Any) -> int:
    """Convert a checkpoint.

    Args:
        parser (`argparse.ArgumentParser`): what reports a wrong command.
        source_format (`str`): the library that has written the checkpoint, "pyreft" or "adapters".
        options: the arguments of `convert_pyreft` or `convert_adapters`.

    Returns:
        `int`: the exit status, 1 after an error that is printed.
    """
    if source_format == "pyreft" and options["positions"] is None:
        parser.error(
            "pyreft does not save positions: say which tokens the adapter was trained to edit, as --positions f7+l7"
        )
    try:
        (convert_pyreft if source_format == "pyreft" else convert_adapters)(**options)
    except (OSError, ValueError) as error:
        print(f"peft-reft: error: {error}", file=sys.stderr)
        return 1
    print(f"Wrote the PEFT adapter to {options['destination']}.")
    return 0
