"""Registration with PEFT, in memory: no file of another package is written."""

from aenum import extend_enum
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method


def add_peft_type() -> PeftType:
    """Return the member REFT of `PeftType`, which is added if it is not there.

    Raises:
        ImportError: if PEFT has a REFT that this package did not add.
    """
    if "REFT" not in PeftType.__members__:
        extend_enum(PeftType, "REFT", "REFT")
        vars(PeftType["REFT"])["added_by"] = __package__
    elif vars(PeftType["REFT"]).get("added_by") != __package__:
        raise ImportError(
            "The installed PEFT has a method REFT of its own, and importing peft_reft would put another in its place. "
            "Use PEFT's (from peft import ReftConfig) and remove the import of peft_reft, or install a PEFT without "
            "it: the CHANGELOG of peft_reft names the versions it was tested with."
        )
    return PeftType["REFT"]


REFT = add_peft_type()


def register(config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Make the method known to PEFT under the name `reft`; a second call changes nothing."""
    if REFT not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name="reft", config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
