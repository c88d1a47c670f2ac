"""What may import what: the floors of the package, read off its imports."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "peft_reft"
MODULES = {".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts): file for file in PACKAGE.rglob("*.py")}
MODULES = {name.removesuffix(".__init__"): file for name, file in MODULES.items()}
# A module imports modules of its own floor or of lower ones. The longest prefix of its name says which one it is on.
FLOORS = [
    ["transforms", "edits", "positions", "registration", "autoload"],
    ["config", "layer", "collator", "saving.card", "runtime.state"],
    ["runtime", "targets", "saving"],
    ["quantized", "base_adapters", "transaction", "model", "resume", "upstream"],
    ["", "convert", "arguments", "cli"],
]
ONLY_TORCH = ("edits", "positions")
LATE = ("peft_reft.autoload", "peft_reft")  # an import that a function makes when all others are done


def imports(name):
    """The modules that a module imports, wherever in its code, and for type checkers only, too."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if (name, alias.name) != LATE)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1]] if node.level else [])
            source = ".".join(filter(None, [base, node.module]))
            yield from (full if (full := f"{source}.{a.name}") in MODULES else source for a in node.names)


def floor(name):
    own = name.partition(".")[2]
    prefixes = {prefix: n for n, floor in enumerate(FLOORS, 1) for prefix in floor}
    return prefixes[max((p for p in prefixes if f"{own}.".startswith(f"{p}." if p else "")), key=len)]


@pytest.mark.parametrize("name", MODULES)
def test_floors(name):
    own = {other for other in imports(name) if other.partition(".")[0] == "peft_reft"}
    assert not {other for other in own if floor(other) > floor(name)}
    if name.split(".")[1:2] and name.split(".")[1] in ONLY_TORCH:
        others = {other.partition(".")[0] for other in imports(name)} - {"peft_reft", "torch"}
        assert others <= sys.stdlib_module_names


def test_no_circle():
    graph = {name: {other for other in imports(name) if other in MODULES} for name in MODULES}
    list(TopologicalSorter(graph).static_order())


def test_edits_and_positions_need_only_torch():
    code = """
import sys
for name in ("peft", "transformers", "accelerate"):
    sys.modules[name] = None
import peft_reft.edits.apply, peft_reft.edits.per_row, peft_reft.positions.language
try:
    peft_reft.ReftConfig
except ImportError as error:
    assert "needs PEFT" in str(error)
else:
    raise AssertionError
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
