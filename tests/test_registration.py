import os

import forks
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

from peft_reft import ReftConfig, ReftModel
from peft_reft.registration import add_peft_type, register


def test_reft_is_a_method_of_peft():
    assert PeftType.REFT == "REFT" and PeftType("REFT") is PeftType.REFT and PeftType.REFT in list(PeftType)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.REFT] is ReftConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.REFT] is ReftModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.REFT] == "reft_"
    assert isinstance(ReftConfig().peft_type, PeftType)


def test_twice_is_harmless():
    assert add_peft_type() is PeftType.REFT
    register(ReftConfig, ReftModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.REFT] is ReftConfig


# Here the import is tested; `tests/test_autoload.py` has what an installation does without it.
ENVIRONMENT = os.environ | {"PEFT_REFT_AUTOLOAD": "0"}


def run(code):
    """Run code in a process that has imported PEFT, and nothing of ours."""
    return forks.run(["-c", code], imported=forks.PEFT, env=ENVIRONMENT)


def test_peft_with_a_reft_of_its_own():
    code = """
from aenum import extend_enum
from peft.utils import PeftType
extend_enum(PeftType, "REFT", "REFT")
import peft_reft
"""
    process = run(code)
    assert process.returncode == 1
    assert "ImportError: The installed PEFT has a method REFT of its own" in process.stdout
    assert "from peft import ReftConfig" in process.stdout


@pytest.mark.slow
def test_imported_again_after_a_reload():
    code = """
import sys, peft_reft
for name in [name for name in sys.modules if name.split(".")[0] == "peft_reft"]:
    del sys.modules[name]
import peft_reft
from peft.utils import PeftType
assert list(PeftType).count("REFT") == 1
"""
    process = run(code)
    assert process.returncode == 0, process.stdout


def test_no_file_of_another_package_is_written():
    """The package opens no file for writing when it is imported."""
    code = """
import sys, peft, transformers, aenum
opened = []
sys.addaudithook(lambda event, args: event == "open" and set(str(args[1])) & set("wax+") and opened.append(args))
sys.dont_write_bytecode = True
import peft_reft
assert not opened, opened
"""
    process = run(code)
    assert process.returncode == 0, process.stdout
