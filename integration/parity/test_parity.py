"""The same numbers as pyreft and adapters: their own checkpoints, converted, on what they were run on.

`make_fixtures.py` has written what is read here. What is known to differ is tested to:

- first or last tokens are cut to half the prompt where both are edited. pyreft cuts them where one end alone is, too;
  adapters never cuts them;
- LoReFT's rotation is trained by another parametrisation (torch's Householder reflections there), so that the losses
  part after the first step, if not far. What does not depend on it is the same: the first loss, the losses where R is
  kept, the outputs with what was trained.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig

from peft_reft.cli.main import main
from peft_reft.convert import convert_adapters, convert_pyreft
from peft_reft.positions.language import Positions

FIXTURES = Path(__file__).parent / "fixtures"
CASES = [f"{folder.parent.name}/{folder.name}" for folder in sorted(FIXTURES.glob("[ap]*/*/"))]
GENERATED = [case for case in CASES if "tokens" in load_file(FIXTURES / case / "reference.safetensors")]
TRAINED = [case for case in CASES if (FIXTURES / case / "initial").exists()]
OPTIMIZER = dict(lr=2e-2, weight_decay=0.0)
MB = 1_000_000


class Fixture:
    """A case, and the converted checkpoint on its base model."""

    def __init__(self, case: str, folder: Path, checkpoint: str = "checkpoint"):
        self.told = json.loads((FIXTURES / case / "case.json").read_text())
        self.reference = load_file(FIXTURES / case / "reference.safetensors")
        base = FIXTURES / "bases" / self.told["base"]
        self.is_of_pyreft = case.startswith("pyreft/")
        source = FIXTURES / case / checkpoint
        if self.is_of_pyreft:
            options = {name: self.told[name] for name in ("positions", "share_weights")}
            convert_pyreft(source, folder, str(base), **options, act_fn=self.told["options"].get("act_fn"))
        else:
            intervention = {"NoReftConfig": "noreft", "DiReftConfig": "direft"}.get(self.told["config"])
            convert_adapters(source, folder, str(base), intervention)
        (architecture,) = AutoConfig.from_pretrained(base).architectures
        self.dtype = getattr(torch, self.told.get("dtype", "float32"))
        self.base = getattr(transformers, architecture).from_pretrained(base, dtype=self.dtype).eval()
        self.model = PeftModel.from_pretrained(self.base, folder)

    def inputs(self, *names: str) -> dict[str, torch.Tensor]:
        """What the peer was given, and the lengths of prompts where a causal model cannot tell them."""
        names = ("input_ids", "attention_mask", *names, *(["prompt_lengths"] if "labels" in self.reference else []))
        return {name: self.reference[name] for name in names}

    @torch.no_grad()
    def outputs(self, **inputs: torch.Tensor) -> torch.Tensor:
        outputs = self.model(**inputs)
        return (outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]).float()

    @property
    def seen(self) -> torch.Tensor:
        """The outputs to compare: of no padding, and of no row that is known to be edited otherwise."""
        mask = self.reference["attention_mask"].bool() & ~self.differs[:, None]
        return mask if self.reference["outputs"].dim() > 2 else mask.any(-1)

    @property
    def differs(self) -> torch.Tensor:
        """The rows [batch] that are edited otherwise: short prompts, cut to their halves here or there alone."""
        positions = Positions.parse(self.model.peft_config["default"].positions)
        is_short = self.reference["prompt_lengths"] // 2 < max(positions.prefix, positions.suffix)
        has_both_ends = bool(positions.prefix and positions.suffix)
        return is_short & (has_both_ends != self.is_of_pyreft)

    @property
    def tolerance(self) -> float:
        return 1e-5 if self.dtype == torch.float32 else 0.03  # bfloat16 has 0.008 between logits of 1 to 2


@pytest.fixture(scope="module")
def fixture(request: Any, tmp_path_factory: Any) -> Fixture:
    return Fixture(request.param, tmp_path_factory.mktemp("converted"))


@pytest.mark.parametrize("fixture", CASES, indirect=True)
def test_outputs(fixture):
    outputs, expected, seen = fixture.outputs(**fixture.inputs()), fixture.reference["outputs"], fixture.seen
    torch.testing.assert_close(outputs[seen], expected[seen], atol=fixture.tolerance, rtol=0)
    with fixture.model.disable_adapter():
        base = fixture.outputs(**{n: v for n, v in fixture.inputs().items() if n != "prompt_lengths"})
    assert (base - expected)[seen].abs().max() > 0.03, "the edit is too small to be seen"


CUT = {
    "pyreft/llama_prefix": [False, True, True, True, True],  # of lengths 8, 5, 4, 2, 1
    "pyreft/llama_suffix": [False, False, False, True, True],
    "adapters/llama_loreft": [False, False, True],  # of lengths 8, 6, 5
}


@pytest.mark.parametrize("fixture", CUT, indirect=True)
def test_rows_that_are_cut_otherwise(fixture, request):
    """By pyreft where one end alone is edited, by adapters nowhere, here where both ends are."""
    assert fixture.differs.tolist() == CUT[request.node.callspec.params["fixture"]]
    difference = (fixture.outputs(**fixture.inputs()) - fixture.reference["outputs"]).abs().amax((1, 2))
    assert (difference[fixture.differs] > 1e-2).all()


@pytest.mark.parametrize("fixture", GENERATED, indirect=True)
def test_generated_tokens(fixture):
    prompts, expected = fixture.reference["prompts"], fixture.reference["tokens"]
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=1)
    tokens = fixture.model.generate(input_ids=prompts, attention_mask=(prompts != 1).long(), **options)
    assert tokens.tolist() == expected.tolist()


@pytest.mark.parametrize("case", TRAINED)
def test_losses(case, tmp_path):
    fixture = Fixture(case, tmp_path, "initial")
    expected = fixture.reference["losses"]
    frozen = "._R" if fixture.told.get("frozen") else None
    parameters = [p for n, p in fixture.model.named_parameters() if "._reft_" in n and not n.endswith(frozen or "-")]
    for parameter in parameters:
        parameter.requires_grad = True
    optimizer, losses = torch.optim.AdamW(parameters, **OPTIMIZER), []
    for _ in expected:
        loss = fixture.model(**fixture.inputs("labels")).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    difference = (torch.stack(losses) - expected).abs()
    same = 1 if "loreft" in case and not frozen else len(expected)
    assert expected[-1] < 0.92 * expected[0]
    assert losses[-1] < 0.92 * losses[0]
    assert difference[:same].max() < 1e-4
    if same == 1:  # another parametrisation, which turns as far in a step
        assert 1e-4 < difference[5:].max() < 0.03


@pytest.mark.parametrize("peer, options", [("pyreft", "--positions f4+l3 --share-weights"), ("adapters", "")])
def test_command(peer, options, tmp_path, capsys):
    case = FIXTURES / peer / ("llama_shared" if peer == "pyreft" else "llama_loreft")
    command = f"convert {peer} {case / 'checkpoint'} {tmp_path / 'by_command'} --base-model {FIXTURES / 'bases/llama'}"
    assert main([*command.split(), *options.split()]) == 0
    Fixture(f"{peer}/{case.name}", tmp_path / "by_function")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("by_command", "by_function")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert f"Wrote the PEFT adapter to {tmp_path / 'by_command'}." in capsys.readouterr().out


def test_size():
    assert sum(path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file()) < 2 * MB
