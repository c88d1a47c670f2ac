"""LoReFT by the reference implementation. Needs pyreft 0.1.0 and pyvene 0.1.8, with transformers 4.57.6."""

from typing import Any

import pyreft
import torch
from torch.nn.functional import pad

from .batches import Batch
from .learners import Learner, at_positions


class WithPyreft(Learner):
    """LoReFT as pyreft's own scripts set it up, with its `get_intervention_locations`."""

    def __init__(
        self,
        base: Any,
        r: int,
        positions: str,
        share_weights: bool,
        layers_to_transform: list[int] | None,
        dropout: float,
    ):
        super().__init__(base)
        self.positions, self.share_weights = positions, share_weights
        blocks = next(name for name, module in base.named_modules() if isinstance(module, torch.nn.ModuleList))
        layers = layers_to_transform or list(range(base.config.num_hidden_layers))
        representations = [
            {
                "component": f"{blocks}[{layer}].output",
                "low_rank_dimension": r,
                "intervention": pyreft.LoreftIntervention(
                    embed_dim=base.config.hidden_size, low_rank_dimension=r, dropout=dropout, dtype=torch.float32
                ),
            }
            for layer in (layers if share_weights or "+" not in positions else [*layers, *layers])
        ]
        head = [p for p in base.parameters() if p.requires_grad]  # get_reft_model freezes it
        self.model = pyreft.get_reft_model(base, pyreft.ReftConfig(representations=representations))
        self.model.set_device(base.device)
        for parameter in head:
            parameter.requires_grad_(True)

    def train(self, mode: bool) -> None:
        super().train(mode)
        self.model.interventions.train(mode)  # pyvene switches the base alone, and their dropout would stay

    def located(self, batch: Batch, on_the_left: bool = False) -> tuple[Batch, dict[str, Any]]:
        """The batch and where to edit it.

        Prompts shorter than the positions have fewer of them; pyreft edits a token of padding in place of each that is
        missing, for which one is added.
        """
        told = {
            "positions": self.positions,
            "num_interventions": len(self.model.interventions),
            "share_weights": self.share_weights,
        }
        rows = [
            pyreft.get_intervention_locations(last_position=length, **told) for length in batch.prompt_lengths.tolist()
        ]
        locations = torch.tensor(rows).permute(1, 0, 2)  # [interventions, batch, positions]
        missing = locations == -1
        if missing.any():
            side = (1, 0) if on_the_left else (0, 1)
            batch = Batch(
                pad(batch.input_ids, side),
                pad(batch.attention_mask, side),
                batch.prompt_lengths,
                pad(batch.answer, side),
            )
        tokens = batch.input_ids.shape[1]
        if on_the_left:
            locations = locations + (tokens - batch.prompt_lengths.cpu())[None, :, None]
        locations[missing] = 0 if on_the_left else tokens - 1
        return batch, {"sources->base": (None, locations.tolist())}

    def call(self, batch: Batch, where: dict[str, Any], **options: Any) -> torch.Tensor:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        return self.model(inputs, unit_locations=where, **options)[1].logits

    def labels(self, batch: Batch) -> torch.Tensor:
        return self.call(*self.located(batch))

    def answers(self, batch: Batch) -> torch.Tensor:
        batch, where = self.located(batch)
        with at_positions(self.base, batch.answer):
            return self.call(batch, where, use_cache=False)

    def generate(self, batch: Batch, **options: Any) -> torch.Tensor:
        batch, where = self.located(batch, on_the_left=True)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        tokens = self.model.generate(inputs, unit_locations=where, intervene_on_prompt=True, **options)[1]
        return tokens[:, batch.input_ids.shape[1] :]
