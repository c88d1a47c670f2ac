import os

import forks
import peft
import pytest
from by_hand import make_llama
from peft import PeftModel, get_peft_model
from transformers.integrations import PeftAdapterMixin

from peft_reft import ReftConfig
from peft_reft.upstream import PATCHES, active_patches, patch_upstream
from peft_reft.upstream.patch import NO_PATCHES, Patch, patch_class, patch_object


def test_twice_is_harmless():
    def methods():
        return PeftModel.__init__, PeftModel.load_adapter, PeftAdapterMixin.load_adapter

    before = methods()
    patch_upstream()
    assert methods() == before


class Library:
    """A class of another library."""

    def load(self, folder, name=None):
        return f"loaded {folder}"

    @classmethod
    def make(cls, folder):
        return cls


def loaded_twice(method, *args, **kwargs):
    return [method(*args, **kwargs)] * 2


@pytest.fixture
def library(monkeypatch):
    """A new class in a module of PEFT, which has a version."""
    owner = type("Library", (Library,), dict(vars(Library)))
    monkeypatch.setattr(peft, "Library", owner, raising=False)
    return owner


def make_patch(**options):
    defaults = dict(owner="peft.Library", name="load", replacement=loaded_twice, why="it loads once", issue="none")
    return Patch(**{**defaults, **options})


@pytest.mark.parametrize(("fixed_in", "is_patched"), [(None, True), ("99.0", True), ("0.1", False), (None, False)])
def test_when_a_class_is_patched(library, monkeypatch, fixed_in, is_patched):
    monkeypatch.setenv(NO_PATCHES, str(int(fixed_in is None and not is_patched)))
    patch = make_patch(fixed_in=fixed_in, parameters=("folder",))
    for _ in range(2):
        patch_class(patch)
    patch_class(make_patch(name="make", fixed_in=fixed_in))
    assert library().load("a") == (["loaded a"] * 2 if is_patched else "loaded a")
    assert library.make("a") == ([library] * 2 if is_patched else library)
    assert patch.is_due == is_patched


def test_object_only(library):
    owner, other = library(), library()
    patch_object(owner, [make_patch(scope="object")])
    assert owner.load("a") == ["loaded a"] * 2 and other.load("a") == "loaded a"
    assert type(owner).__name__ == "Library" and isinstance(owner, library)
    patch_object(other, [make_patch(scope="object", fixed_in="0.1")])
    assert type(other) is library


@pytest.mark.parametrize("patch", [patch_class, lambda patch: patch_object(peft.Library(), [patch])])
def test_function_that_has_changed(library, recwarn, monkeypatch, patch):
    """It is patched all the same if it exists, since its other parameters may not matter."""
    monkeypatch.setattr("peft_reft.upstream.patch._warned", set())
    for _ in range(2):
        patch(make_patch(parameters=("path",)))
        patch(make_patch(name="load_all"))
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == 2
    assert "peft.Library.load, which has the parameters folder, name in" in messages[0]
    assert "first should be path" in messages[0] and "it loads once" in messages[0]
    assert "peft.Library.load_all, which does not exist" in messages[1]


def test_table(monkeypatch):
    """Every patch says why it is there, and is left out by the environment variable if it can be."""
    assert len({patch.target for patch in PATCHES}) == len(PATCHES)
    for patch in PATCHES:
        assert patch.why and (patch.issue.startswith("https://github.com/") or patch.issue == "not reported yet")
    assert active_patches() == list(PATCHES)
    monkeypatch.setenv(NO_PATCHES, "1")
    assert {patch.scope for patch in active_patches()} == {"model"}
    assert type(get_peft_model(make_llama(1), ReftConfig(r=2))) is PeftModel


def test_installed_versions_have_what_is_patched(recwarn):
    """No function has changed."""
    for patch in PATCHES:
        if patch.scope != "model":
            assert patch.name in dir(patch.find_owner()), patch.target
    assert not [warning for warning in recwarn if "peft_reft patches" in str(warning.message)]


# Here the import is tested; `tests/test_autoload.py` has what an installation does without it.
ENVIRONMENT = os.environ | {"PEFT_REFT_AUTOLOAD": "0"}


def run(code, *args):
    """Run code in a process that has imported PEFT, and nothing of ours."""
    return forks.run(["-c", code, *args], imported=forks.PEFT, env=ENVIRONMENT)


def test_import_brings_nothing_heavy():
    code = """
import sys
import peft
before = set(sys.modules)
import peft_reft
added = sys.modules.keys() - before
assert "peft_reft.upstream.trainer" in added
heavy = ("accelerate", "datasets", "pandas", "pyarrow", "torch", "transformers")
assert not [name for name in added if name.split(".")[0] in heavy], added
"""
    process = run(code)
    assert process.returncode == 0, process.stdout


def test_no_patches():
    code = """
import peft_reft
from peft import PeftModel
from transformers import Trainer
for function in (PeftModel.__init__, PeftModel.load_adapter, Trainer.__init__):
    assert not hasattr(function, "__wrapped__"), function
"""
    process = forks.run(["-c", code], imported=forks.PEFT, env=ENVIRONMENT | {NO_PATCHES: "1"})
    assert process.returncode == 0, process.stdout
