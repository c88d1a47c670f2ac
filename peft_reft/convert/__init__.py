"""Checkpoints of pyreft and of adapters, turned into PEFT adapters.

Each is read into `Edits`, which `save_adapter` puts into an adapter of the base model. The base model is built from
its config on the meta device, without weights, so that nothing of its size is read or held.
"""

from pathlib import Path

from .adapters import read_adapters
from .pyreft import read_pyreft
from .save import save_adapter

__all__ = ["convert_adapters", "convert_pyreft"]


def convert_pyreft(
    source: str | Path,
    destination: str | Path,
    base_model: str,
    positions: str,
    share_weights: bool | None = None,
    first_unit: str | None = None,
    act_fn: str | None = None,
    task_type: str | None = None,
    num_labels: int | None = None,
    head: bool = True,
) -> None:
    """Turn a checkpoint of pyreft into a PEFT adapter.

    Args:
        source (`str` or `Path`): a folder that pyreft's `save` has written, or an id on the Hub.
        destination (`str` or `Path`): the folder to write, new or empty.
        base_model (`str`): the base model, a folder or an id on the Hub. Only its config is read.
        positions (`str`): as in `ReftConfig`; pyreft does not save them. `"f7+l7"` becomes `"f7+l7-middle"`: pyreft
            edits no middle token of an odd prompt that is too short for both ends.
        share_weights (`bool`, *optional*): whether first and last tokens were edited by the same weights. None for
            what the number of interventions of each module tells, two if they were not; one can mean either (an
            error asks for it then). No matter where one end alone is edited.
        first_unit (`str`, *optional*): `"prefix"` or `"suffix"`, what the first of a module's two interventions edits.
            None for locations by pyreft's `get_intervention_locations`: all for prefixes come first.
        act_fn (`str`, *optional*): as in `ReftConfig`; pyreft does not save it.
        task_type (`str`, *optional*): one of PEFT's; None for that of the base model's own class.
        num_labels (`int`, *optional*): of a classifier's head; None for those of the base model's config.
        head (`bool`): whether a head that was trained and saved with the edits is converted with them.

    Raises:
        ValueError: if it is no such checkpoint, cannot be expressed, or needs an argument that is not given.
    """
    edits = read_pyreft(source, positions, share_weights, first_unit, act_fn)
    save_adapter(edits, base_model, destination, task_type, num_labels, head)


def convert_adapters(
    source: str | Path,
    destination: str | Path,
    base_model: str,
    intervention: str | None = None,
    task_type: str | None = None,
    num_labels: int | None = None,
    head: bool = True,
) -> None:
    """Turn a checkpoint of adapters (AdapterHub) into a PEFT adapter.

    Args:
        source (`str` or `Path`): a folder that `save_adapter` has written, or an id on the Hub.
        destination (`str` or `Path`): the folder to write, new or empty.
        base_model (`str`): the base model, a folder or an id on the Hub. Only its config is read.
        intervention (`str`, *optional*): as in `ReftConfig`. adapters does not save whether the projection is
            subtracted: None for LoReFT where it is orthogonal; else say whether it is `"noreft"` or `"direft"`.
        task_type (`str`, *optional*): one of PEFT's; None for that of the base model's own class.
        num_labels (`int`, *optional*): of a classifier's head; None for those of the base model's config.
        head (`bool`): whether a head that was trained and saved with the edits is converted with them.

    Raises:
        ValueError: if it is no such checkpoint, cannot be expressed, or needs an argument that is not given.
    """
    save_adapter(read_adapters(source, intervention), base_model, destination, task_type, num_labels, head)
