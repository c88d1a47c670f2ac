"""What a checkpoint of another library holds."""

from dataclasses import dataclass, field

import torch

Tensors = dict[str, torch.Tensor]


@dataclass
class Edits:
    """Edits of hidden states, in the words of `ReftConfig`.

    Attributes:
        units: the tensors R [r, d], W [r, d] and b [r] of each unit (`"unit"`, or `"prefix"` and `"suffix"`) of each
            module, which is named by its path in the model, or by the index of the block that it is.
        every_block (`bool`): whether the checkpoint says that each block of the base model is edited.
        head (`dict[str, torch.Tensor]`): parameters of the base model that were saved too, by name.
        trains_output_embeddings (`bool`): whether those of a language model's head are trained, if they are saved.
    """

    intervention: str
    positions: str
    share_weights: bool
    units: dict[int | str, dict[str, Tensors]]
    every_block: bool = False
    act_fn: str | None = None
    dropout: float = 0.0
    head: Tensors = field(default_factory=dict)
    trains_output_embeddings: bool = True
