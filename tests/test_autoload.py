"""The import of peft_reft at the end of PEFT's, with stand-ins for torch, PEFT and transformers in new processes.

`integration/transformers/test_autoload.py` has the real ones.
"""

import shutil
import subprocess
import sys

import pytest
from installed import environment, install

TORCH = """
import os
from importlib.metadata import entry_points

if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "1":  # as torch/__init__.py of 2.6 to 2.13
    for extension in entry_points(group="torch.backends"):
        try:
            extension.load()()
        except Exception as error:
            raise RuntimeError(f"Failed to load the backend extension: {extension.name}") from error
"""
PACKAGES = {
    "torch/__init__.py": TORCH,
    "peft/__init__.py": "from peft import utils\nimport torch\nMETHODS = []\n",
    "peft/utils.py": "",
    "transformers/__init__.py": "",
    "transformers/trainer.py": "import peft\nTrainer = 1\n",
    "transformers/integrations/__init__.py": "",
    "transformers/integrations/peft.py": """
import torch

class PeftAdapterMixin:
    def load_adapter(self, name):
        "Load an adapter."
        import peft
        return [name, "not patched"]
""",
    "peft_reft/__init__.py": """
from peft import METHODS
from transformers.integrations.peft import PeftAdapterMixin
from transformers.trainer import Trainer

METHODS.append("reft")
method = PeftAdapterMixin.load_adapter
PeftAdapterMixin.load_adapter = lambda self, name: method(self, name)[:1] + ["patched"]
""",
}


@pytest.fixture
def site(tmp_path):
    """A folder with stand-ins for the packages, and with peft_reft as it is installed."""
    for name, text in PACKAGES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    install(tmp_path)
    return tmp_path


def run(site, code, *options, **variables):
    """What a process prints, and its warnings and errors."""
    process = subprocess.run(
        [sys.executable, *options, "-c", code],
        env=environment(site, **variables),
        capture_output=True,
        text=True,
        cwd=site,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip(), process.stderr


ORDERS = {
    "torch first": "import torch, peft",
    "peft, which imports torch": "import peft",
    "a name of peft": "from peft import METHODS",
    "a module of peft": "import peft.utils",
    "peft_reft first": "import peft_reft",
    "peft_reft after peft": "import peft, peft_reft",
    "transformers, which imports peft while it is imported itself": "from transformers.trainer import Trainer",
    "torch, then transformers": "import torch; from transformers.trainer import Trainer",
    "torch twice": "import importlib, torch; importlib.reload(torch); import peft; importlib.reload(torch)",
    "a spec that is not used": "import importlib.util as u, torch; assert u.find_spec('peft').loader; import peft",
    "a thread": "import threading, torch; t = threading.Thread(target=__import__, args=['peft']); t.start(); t.join()",
}


@pytest.mark.parametrize("code", ORDERS.values(), ids=ORDERS)
def test_orders(site, code):
    code += """
import sys
peft = sys.modules["peft"]
assert "peft_reft" in sys.modules, "only an import of peft_reft itself registers it"
print(peft.METHODS)
from importlib.machinery import ModuleSpec
specs = [module.__spec__ for module in list(sys.modules.values()) if getattr(module, "__spec__", None)]
assert all(type(spec) is ModuleSpec for spec in specs if spec.name.startswith(("peft", "transformers")))
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "peft_reft_autoload"]
"""
    assert run(site, code) == ("['reft']", "")


def test_methods_are_registered_when_the_import_statement_ends(site):
    """Not at some later import: in the very next statement, at the top of a module that is imported."""
    (site / "users_module.py").write_text("from peft import METHODS\nprint(METHODS)\n")
    assert run(site, "import users_module") == ("['reft']", "")


def test_nothing_is_imported_before_peft(site):
    code = "import sys, torch; print(*sorted(sys.modules.keys() & {'peft', 'peft_reft', 'transformers'}))"
    assert run(site, code) == ("", "")


def test_reload_of_peft(site):
    code = (
        "import importlib, peft; importlib.reload(peft); print('peft_reft' in dir(__import__('sys').modules['peft']))"
    )
    assert run(site, code) == ("False", "")


def test_new_processes(site):
    (site / "work.py").write_text("import peft\ndef methods(_): return peft.METHODS\n")
    code = """
import multiprocessing, subprocess, sys, work
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(work.methods, [0]))
    print(subprocess.check_output([sys.executable, "-c", "import peft; print(peft.METHODS)"], text=True).strip())
"""
    assert run(site, code) == ("[['reft']]\n['reft']", "")


def test_other_finders(site):
    """One that is asked first, and finds PEFT."""
    code = """
import sys, torch
from importlib.util import spec_from_file_location

class Finds:
    def find_spec(self, name, path=None, target=None):
        if name == "peft":
            return spec_from_file_location("peft", "elsewhere.py", submodule_search_locations=["peft"])

sys.meta_path.insert(0, Finds())
import peft
print(peft.__file__.rpartition("/")[2], peft.METHODS)
"""
    (site / "elsewhere.py").write_text("from . import utils\nMETHODS = ['elsewhere']")
    assert run(site, code) == ("elsewhere.py ['elsewhere', 'reft']", "")


def test_first_call_of_load_adapter_is_patched(site):
    """peft_reft replaces the method, which imports PEFT when it is called: too late for that call."""
    code = """
from transformers.integrations.peft import PeftAdapterMixin as Mixin
import sys
assert "peft" not in sys.modules and Mixin.load_adapter.__doc__ == "Load an adapter."
model = Mixin()
print(model.load_adapter("a"), model.load_adapter(name="b"))
"""
    assert run(site, code) == ("['a', 'patched'] ['b', 'patched']", "")
    assert run(site, code, PEFT_REFT_AUTOLOAD="0") == ("['a', 'not patched'] ['b', 'not patched']", "")
    order = "import torch, peft; " + code.replace(
        '"peft" not in sys.modules and Mixin.load_adapter.__doc__', "'Load an adapter.'"
    )
    assert run(site, order) == ("['a', 'patched'] ['b', 'patched']", "")
    (site / "peft" / "__init__.py").write_text("raise ImportError('no peft here')")
    code = code.partition("print")[0] + "try: model.load_adapter('a')\nexcept ImportError as error: print(error)"
    assert run(site, code) == ("no peft here", "")


@pytest.mark.parametrize("variable", ["PEFT_REFT_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_switched_off(site, variable):
    code = "import sys, torch, peft; print(peft.METHODS, len(sys.meta_path)); import peft_reft; print(peft.METHODS)"
    finders = run(site, "import sys; print(len(sys.meta_path))")[0]
    assert run(site, code, **{variable: "0"}) == (f"[] {finders}\n['reft']", "")
    assert run(site, code, **{variable: "1"})[0].startswith("['reft']")


BROKEN = {
    "peft_reft raises": lambda site: (site / "peft_reft" / "__init__.py").write_text("1 / 0"),
    "peft_reft does not parse": lambda site: (site / "peft_reft" / "__init__.py").write_text("what?"),
    "the folder of an editable installation is gone": lambda site: shutil.rmtree(site / "peft_reft"),
    "PEFT has not what peft_reft needs": lambda site: (site / "peft" / "__init__.py").write_text("import torch"),
}


@pytest.mark.parametrize("break_it", BROKEN.values(), ids=BROKEN)
def test_broken_package_breaks_nothing_else(site, break_it):
    break_it(site)
    code = "import torch, peft; from transformers.trainer import Trainer; print(Trainer)"
    output, errors = run(site, code)
    assert output == "1"
    assert errors.count("Warning: peft_reft is installed, but cannot be imported") == 1, errors
    assert "PEFT_REFT_AUTOLOAD=0" in errors
    assert run(site, code, "-W", "error") == ("1", "")


def test_peft_that_fails(site):
    """Its error is PEFT's own, and peft_reft is imported once PEFT can be."""
    (site / "peft" / "utils.py").write_text("import os\nif 'FAIL' in os.environ: raise ImportError('old numpy')\n")
    code = """
import os, sys
os.environ["FAIL"] = "1"
for _ in range(2):
    try:
        import torch, peft
    except ImportError as error:
        print(error, "peft_reft" in sys.modules)
del os.environ["FAIL"]
import peft
print(peft.METHODS)
"""
    assert run(site, code) == ("old numpy False\nold numpy False\n['reft']", "")


def test_transformers_module_that_fails(site):
    """PEFT was imported by a module that failed later: peft_reft waits for its end, not for its success."""
    (site / "transformers" / "broken.py").write_text("import peft\n1 / 0\n")
    code = """
try:
    import transformers.broken
except ZeroDivisionError:
    import peft
    print(peft.METHODS)
"""
    assert run(site, code) == ("['reft']", "")


WATCH = """
import importlib.util, sys
from importlib.machinery import ModuleSpec

def load(name):  # the module of the package, and its copy in site-packages
    spec = importlib.util.spec_from_file_location(name, "peft_reft_autoload.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

copies = [load("one"), load("two")]
calls = []

def watch():
    for copy in copies:
        def action(copy=copy):
            if "watched" in sys.modules:
                copy.stop_watching("watched")
                calls.append((copy.__name__, hasattr(sys.modules["watched"], "LAST")))
        copy.watch("watched", action)
"""
WATCHED = {
    "before": "watch()\nimport watched",
    "in the middle": "import watched",
    "after": "import watched\nwatch()",
    "before, failed": "watch()\ntry:\n    import watched, absent\nexcept ImportError:\n    import watched",
}


@pytest.mark.parametrize("order", WATCHED)
def test_watch(site, order):
    """An action comes when the module has all its names, whatever else watches it."""
    middle = "import __main__\n__main__.watch()\n" if order == "in the middle" else ""
    failed = "import sys\nif not hasattr(sys, 'again'):\n    sys.again = 1\n    import absent\n"
    text = f"{middle}{failed if 'failed' in order else ''}import email\nLAST = 1\n"
    (site / "watched.py").write_text(text)
    code = f"{WATCH}\n{WATCHED[order]}\nprint(sorted(calls), type(sys.modules['watched'].__spec__) is ModuleSpec)"
    code += "\nprint([finder for finder in sys.meta_path if type(finder).__name__ == 'Watcher'])"
    assert run(site, code, PEFT_REFT_AUTOLOAD="0") == ("[('one', True), ('two', True)] True\n[]", "")


def test_error_of_an_action(site):
    (site / "watched.py").write_text("LAST = 1\n")
    code = f"{WATCH}\ncopies[0].watch('watched', lambda: 1 / 0)\nimport watched, email\nprint(watched.LAST)"
    output, errors = run(site, code, PEFT_REFT_AUTOLOAD="0")
    assert output == "1" and "ZeroDivisionError" in errors
