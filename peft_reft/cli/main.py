"""The command line: `peft-reft`, or `python -m peft_reft.cli`."""

import argparse
from collections.abc import Sequence

from . import convert, env


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line. Each command has a file."""
    parser = argparse.ArgumentParser(prog="peft-reft", description="ReFT as a PEFT method.")
    commands = parser.add_subparsers(dest="command", required=True)
    convert.add_arguments(
        commands.add_parser("convert", help="turn a checkpoint of another library into a PEFT adapter")
    )
    commands.add_parser("env", help="print versions and the patches of other libraries, for a bug report")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments (`Sequence[str]`, *optional*): what follows the program's name; `sys.argv` if None.

    Returns:
        `int`: the exit status, 1 after an error that is printed.
    """
    parser = make_parser()
    options = vars(parser.parse_args(arguments))
    if options.pop("command") == "convert":
        return convert.run(parser, **options)
    return env.run()
