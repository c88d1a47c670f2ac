"""The quality benchmark runs, and its templates, answers, metrics and batches are right. How good anything is, is not
tested: tiny models with random weights, and a few rows in the files' own formats."""

import itertools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from quality import ablations, render, train
from quality.batches import Sample, by_length, collate, collate_prompts, draw_batches, encode
from quality.data import Example, find_folder, make_example, question, read_rows, split_task
from quality.job import run_elsewhere
from quality.learners import at_positions, count_trained, make_learner
from quality.metrics import extract_letter, extract_number, is_right, matthews
from quality.protocol import Ablation, load_protocol
from quality.render import validation_loss
from quality.run import Prepared, Results, Setup, options_of, read_records, run_contender
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
)
from transformers import PreTrainedTokenizerFast as Fast

from peft_reft.edits.intervention import Intervention

PROTOCOL = load_protocol()
REAL_DATA = Path(__file__).parents[3] / "shared" / "data"
SIZE = {"train": 12, "validation": 6, "test": 4, "epochs": 1}
CPU = torch.device("cpu")
CHOICE = {"instruction": "Is it ?\n\nAnswer format: true/false", "input": "", "answer": "true"}


# Data in the formats of the files, and models that read it


def rows_of(file: str) -> str:
    """Forty rows; each of a training file asks something else, and none what those of another file ask."""
    trained = "train" in file
    if file.endswith("tsv"):
        cells = "gj04\t{0}\t\tword{1} it" if "cola" in file else "{0}\tword{1} it is"
        cells += " {2}" if trained else ""
        return "\n".join(cells.format(row % 2, row % 5, row) for row in range(40)) + "\n"
    if "seed" in file:
        rows = [
            {"instruction": f"say {i}", "instances": [{"input": "it" * (i % 2), "output": f"it is {i}"}]}
            for i in range(40)
        ]
    elif "gsm8k-train" in file:
        rows = [{"question": f"{i} and 1 ?", "answer": f"It is <<{i}+1=2>>2 .\n#### {i + 1}"} for i in range(40)]
    elif "arithmetic" in file:
        answers = ["B" if "AQuA" in file else f"{i}.0" for i in range(40)]
        rows = [
            {
                "instruction": f"{i} and {2 * trained} ?",
                "input": "",
                "output": f"\nA: The answer is {answer} .",
                "answer": answer,
            }
            for i, answer in enumerate(answers)
        ]
    else:
        answers = [("true", "false")[i % 2] for i in range(40)]
        rows = [CHOICE | {"output": f"the correct answer is {a}", "answer": a} for a in answers]
        for i, row in enumerate(rows if trained else []):
            row["instruction"] = f"{file} {i} {row['instruction']}"
    return "\n".join(map(json.dumps, rows)) if file.endswith("jsonl") else json.dumps(rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for family in PROTOCOL.families.values():
        for task in family.tasks.values():
            for file in [*task.train, *task.test.values()]:
                (folder / file).parent.mkdir(exist_ok=True)
                (folder / file).write_text(rows_of(file))
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Fast:
    words = ["true", "false", "the", "correct", "answer", "is", "it", "It", "A", "B", "The", "and", "say", "Response"]
    words += ["<pad>", "<unk>", "<eos>", *map(str, range(10)), *(f"word{i}" for i in range(5)), *".?:/#\n"]
    core = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|word\d|\d|[^\s\w]|[A-Za-z]+"), "removed", invert=True)
    return Fast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer) -> dict[str, str]:
    """A causal model and an encoder."""
    shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    causal = LlamaForCausalLM(
        LlamaConfig(**shape, num_hidden_layers=2, pad_token_id=tokenizer.pad_token_id, eos_token_id=None)
    )
    encoder = BertForSequenceClassification(BertConfig(**shape, num_hidden_layers=6))
    found = {}
    for name, model in (("gemma-3-270m", causal), ("minilm-l6", encoder)):
        found[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


def make_setup(name: str, data: Path, folders: dict[str, str], **training) -> Setup:
    family = PROTOCOL.families[name]
    sized = family.training | {"learning_rates": [1e-3], "batch_size": 4} | training
    if "max_new_tokens" in sized:
        sized["max_new_tokens"] = 2
    reft = family.reft | ({"layers_to_transform": [-1]} if family.reft["layers_to_transform"] else {})
    return Setup(replace(family, training=sized, reft=reft), SIZE, data, folders[family.model], family.model)


# Templates, answers, metrics


def test_prompts_and_answers():
    families = PROTOCOL.families
    row = CHOICE | {"output": "the correct answer is true"}
    choices = ["the correct answer is true", "the correct answer is false"]
    assert make_example(families["commonsense"], row) == Example(
        "Is it ?\n\nAnswer format: true/false\n", "the correct answer is true", 0, choices
    )
    row = {"instruction": "1 + 1?", "input": "", "output": "\nA: 2", "answer": "2"}
    begin = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    prompt = f"{begin}\n\n### Instruction:\n1 + 1?\n\n### Response:\n"
    assert make_example(families["arithmetic"], row) == Example(prompt, "A: 2", "2")
    assert make_example(families["instruction"], row).prompt == prompt
    begin = (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    )
    begin += "response that appropriately completes the request."
    prompt = f"{begin}\n\n### Instruction:\n1 + 1?\n\n### Input:\nx\n\n### Response:\n"
    assert make_example(families["instruction"], row | {"input": "x"}).prompt == prompt
    assert make_example(families["nlu"], {"sentence": "It is.", "label": 1}) == Example("It is.", "", 1)


def test_formats(data):
    assert read_rows(data / "nlu/cola-dev.tsv")[1] == {"sentence": "word1 it", "label": 1}
    assert read_rows(data / "nlu/sst2-train.tsv")[3]["label"] == 1
    gsm8k = {"instruction": "4 and 1 ?", "input": "", "output": "It is 2 . The answer is 5.", "answer": "5"}
    assert read_rows(data / "arithmetic/gsm8k-train.jsonl")[4] == gsm8k
    seed = {"instruction": "say 1", "input": "it", "output": "it is 1", "answer": ""}
    assert read_rows(data / "instruction/alpaca-seed-tasks.jsonl")[1] == seed


def test_answers_in_generated_text():
    assert extract_number("First 3, then 1,234.50 in all") == 1234.5
    assert extract_number("from -2 to -7") == -7
    assert extract_number("none") == float("inf")
    assert extract_letter("A: It is 4. The answer is (D).") == "D"
    assert extract_letter("Both C and D") == "C"
    assert extract_letter("none") == ""
    assert is_right("so 12 - 8 = 4. The answer is 4.", "4.0") and not is_right("4 or 5", "4")
    assert is_right("The answer is (B)", "B") and not is_right("nothing", "5")


def test_matthews():
    """tp 2, tn 1, fp 1, fn 1: (2 * 1 - 1 * 1) / sqrt(3 * 3 * 2 * 2)"""
    assert matthews([1, 1, 1, 0, 0], [1, 1, 0, 0, 1]) == pytest.approx(1 / 6)
    assert matthews([1, 0], [1, 0]) == 1 and matthews([0, 1], [1, 0]) == -1 and matthews([1, 1], [1, 0]) == 0


# Batches


def test_encode(tokenizer):
    example = make_example(PROTOCOL.families["commonsense"], CHOICE | {"output": "the correct answer is false"})
    sample = encode(tokenizer, example)
    texts = tokenizer.convert_ids_to_tokens(sample.ids[sample.prompt :])
    assert texts == ["the", "correct", "answer", "is", "false", "<eos>"]
    assert tokenizer.convert_ids_to_tokens(sample.ids[sample.prompt - 1]) == "\n"
    assert (sample.label, sample.fork) == (1, 4)
    assert tokenizer.convert_ids_to_tokens(sample.rivals) == ["true", "false"]
    with pytest.raises(ValueError, match="do not all differ"):
        encode(tokenizer, Example("it", "it is 1 1", 0, ["it is 1 1", "it is 1 2", "it is 2 1"]))


def test_collate():
    samples = [Sample([5, 6, 7, 8], prompt=2), Sample([5, 9], prompt=1)]
    batch = collate(samples, pad=0, device=CPU)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [5, 9, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.prompt_lengths.tolist() == [2, 1]
    assert batch.answer.int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 0]]
    assert batch.targets().tolist() == [7, 8, 9]
    prompts = collate_prompts(samples, pad=0, device=CPU)
    assert prompts.input_ids.tolist() == [[5, 6], [0, 5]]
    assert prompts.attention_mask.tolist() == [[1, 1], [0, 1]]


def test_batches_hold_each_row_once_an_epoch():
    samples = [Sample([0] * (1 + at % 7), prompt=1) for at in range(50)]
    batches = draw_batches(samples, batch_size=4, epochs=2, seed=0)
    assert batches == draw_batches(samples, batch_size=4, epochs=2, seed=0)
    assert batches != draw_batches(samples, batch_size=4, epochs=2, seed=1)
    for epoch in (batches[:13], batches[13:]):
        assert sorted(row for batch in epoch for row in batch) == list(range(50))
    assert sorted(row for batch in by_length(samples, 8) for row in batch) == list(range(50))


def test_parts_share_no_row(data):
    family = PROTOCOL.families["instruction"]
    split = split_task(family, family.tasks["seed-tasks"], data, SIZE)
    parts = [split.train, split.validation, split.tests["seed-tasks"]]
    assert [len(part) for part in parts] == [12, 6, 4]
    assert len({example.prompt for part in parts for example in part}) == 22


def test_questions_of_test_files_are_not_trained_on(data, tmp_path):
    """Whether or not the row is among those that are drawn to test with; nor those of the validation part."""
    family = PROTOCOL.families["arithmetic"]
    task = family.tasks["arithmetic"]
    shutil.copytree(data / "arithmetic", tmp_path / "arithmetic")
    file = tmp_path / task.train[0]
    rows = json.loads(file.read_text())
    asked = [{**rows[0], "instruction": f" {i}  AND 0?"} for i in range(40)]  # what all test files ask
    file.write_text(json.dumps([*rows, *asked, *rows]))
    split = split_task(family, task, tmp_path, SIZE)
    assert all("and 0" not in example.prompt.lower() for example in [*split.train, *split.validation])
    assert not {e.prompt for e in split.train} & {e.prompt for e in split.validation}
    assert split.held_out == 40 + len({e.prompt for e in split.validation if "and 2" in e.prompt})


def test_rows_that_contradict_themselves_are_not_trained_on(data, tmp_path):
    family = PROTOCOL.families["arithmetic"]
    task = family.tasks["arithmetic"]
    shutil.copytree(data / "arithmetic", tmp_path / "arithmetic")
    file = tmp_path / task.train[0]
    rows = json.loads(file.read_text())
    file.write_text(json.dumps([row | {"output": "A: The answer is 77 ."} for row in rows[:30]] + rows[30:]))
    split = split_task(family, task, tmp_path, SIZE)
    assert split.contradictory == 30 and split_task(family, task, data, SIZE).contradictory == 0
    assert all("77" not in example.answer for example in [*split.train, *split.validation])


def test_dropout_is_the_familys_for_lora_too():
    family = replace(PROTOCOL.families["nlu"], reft=PROTOCOL.families["nlu"].reft | {"dropout": 0.3})
    task = family.tasks["sst2"]
    assert options_of(PROTOCOL.contenders["lora-r8-qv"], family, task)["lora_dropout"] == 0.3
    assert options_of(PROTOCOL.contenders["loreft"], family, task)["dropout"] == 0.3
    assert options_of(PROTOCOL.contenders["loreft-pyreft"], family, task)["dropout"] == 0.3


# Runs


SMOKE = "instruction"  # the family that is run in every test run
FAMILIES = [name if name == SMOKE else pytest.param(name, marks=pytest.mark.benchmarks) for name in PROTOCOL.families]


@pytest.mark.parametrize("name", FAMILIES)
def test_family_runs(name, data, folders, tmp_path, monkeypatch):
    """One contender of each method: well-formed results, the same batches, and no run a second time."""
    setup = make_setup(name, data, folders)
    file = tmp_path / "results" / f"{name}.jsonl"
    contenders = {key: PROTOCOL.contenders[key] for key in ("base", "loreft", "reft-all-r8", "lora-r8-qv")}

    def run_all():
        for task in setup.family.tasks.values():
            prepared = Prepared(setup, task)
            for key, options in contenders.items():
                seeds = [0, 1] if key == "loreft" else [0]
                run_contender(prepared, key, options_of(options, setup.family, task), seeds, Results(file))

    run_all()
    monkeypatch.setattr(train, "run", lambda job: pytest.fail("a finished run was run again"))
    run_all()
    records = read_records(file)
    for task in setup.family.tasks.values():
        own = [record for record in records if record["task"] == task.name]
        trained = [record for record in own if record.get("steps")]
        assert len(trained) == 1 + len(contenders) - (name != "nlu")
        first, second = ({r["batches"] for r in trained if r["seed"] == seed} for seed in (0, 1))
        assert len(first) == len(second) == 1 and first != second
        for record in own:
            assert set(record["tests"]) == set(task.test)
            assert all(found[task.metric] == found[task.metric] for found in record["tests"].values())
            assert record["sized"]["rows"]["train"] == 12
            total, tokens = map(sum, zip(*record["losses"]["validation"], strict=True))
            assert (
                total / tokens == pytest.approx(validation_loss(record)) and len(record["losses"]["validation"]) == 6
            )
            assert (record["trainable_parameters"] > 0) == (record["name"] != "base")
            assert (record["head_parameters"] > 0) == (name == "nlu")
        for record in trained:
            own_rates = contenders[record["name"]].get("learning_rates", [1e-3])
            assert (
                [record["learning_rate"]] == own_rates and record["seconds_a_step"] > 0 and record["peak_memory"] > 0
            )
    page = tmp_path / "docs" / "results.md"
    render.write(page, render.render(records, page))
    assert "| loreft |" in page.read_text()
    assert (page.parent / "results" / f"{name}.svg").exists()


@pytest.mark.parametrize(("best", "tried"), enumerate([4, 4, 3, 3, 4, 4]))
def test_learning_rates_are_searched_from_the_middle(monkeypatch, best, tried):
    """Of six the best is found, what was trained with it is kept, and what lies behind a worse one is not tried."""
    rates = [1e-4, 3e-4, 9e-4, 3e-3, 9e-3, 2.7e-2]
    now = []
    monkeypatch.setattr(train, "make_learner", lambda job: now)
    monkeypatch.setattr(train.gc, "collect", lambda: None)  # of all that the tests have made
    monkeypatch.setattr(train, "train", lambda learner, job, rate: now.append(rate) or {"rate": rate})
    monkeypatch.setattr(train, "evaluate", lambda *args, **options: abs(rates.index(now[-1]) - best))
    monkeypatch.setattr(train, "summarize", lambda scoring, distance, labels: {"loss": float(distance)})
    job = SimpleNamespace(learning_rates=rates[::-1], scoring="loss", metric="loss", validation=[])
    search = train.Search(job)
    assert search.climb() == rates[best] == search.trained["rate"]
    assert len(now) == len(search.found) == tried


def test_a_diverged_learning_rate_is_not_chosen(monkeypatch):
    losses = {1e-3: 2.0, 1e-2: float("nan")}
    now = []
    monkeypatch.setattr(train, "make_learner", lambda job: now)
    monkeypatch.setattr(train, "train", lambda learner, job, rate: now.append(rate) or {})
    monkeypatch.setattr(train, "evaluate", lambda *args, **options: None)
    monkeypatch.setattr(train, "summarize", lambda *args: {"loss": losses[now[-1]]})
    job = SimpleNamespace(learning_rates=[1e-2, 1e-3], scoring="loss", metric="loss", validation=[])
    assert train.Search(job).climb() == 1e-3


def test_runs_with_other_settings_are_other_runs(data, folders, tmp_path, monkeypatch):
    """Nothing is taken from a file that was made with other options, rows or models; an ablation takes the same."""
    setup = make_setup("nlu", data, folders)
    task, loreft = setup.family.tasks["sst2"], PROTOCOL.contenders["loreft"]
    made = []
    monkeypatch.setattr("quality.run.run_job", lambda setup, job: made.append(job))
    outcome = {"learning_rate": 1e-3, "tests": {}, "trainable_parameters": 1}
    monkeypatch.setattr("quality.run.finished", lambda prepared, result: outcome)

    def run(setup, **more):
        options = options_of(loreft, setup.family, task) | more.pop("options", {})
        run_contender(Prepared(setup, task), "loreft", options, [0], Results(tmp_path / "r.jsonl"), **more)

    others = [
        {"setup": setup},
        {"setup": setup, "options": {"r": 2}},
        {"setup": replace(setup, size=SIZE | {"train": 10})},
        {"setup": replace(setup, model_name="other")},
        {"setup": setup, "ablation": "rank", "value": "1"},
    ]
    for _ in range(2):
        for other in others:
            run(**dict(other))
    assert len(made) == len(others) - 1
    records = Results(tmp_path / "r.jsonl").records
    assert [record["value"] for record in records] == [None, None, None, None, "1"]
    assert records[-1] | {"ablation": None, "value": None} == records[0]


@pytest.mark.benchmarks
def test_head_of_a_roberta_is_drawn_by_the_seed(data, tokenizer, tmp_path):
    """Whose classifier has two layers, and which is not pretrained in a checkpoint of the base."""
    shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": len(tokenizer)}
    config = RobertaConfig(**shape, num_hidden_layers=2, pad_token_id=tokenizer.pad_token_id)
    RobertaModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    setup = make_setup("nlu", data, {"minilm-l6": str(tmp_path)})
    prepared = Prepared(setup, setup.family.tasks["sst2"])
    options = options_of(PROTOCOL.contenders["loreft"], setup.family, prepared.task)
    first, same, other = (make_learner(prepared.job(options, seed, [])).base.classifier for seed in (0, 0, 1))
    for layer in ("dense", "out_proj"):
        drawn = [getattr(head, layer).weight for head in (first, same, other)]
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    result = train.run(prepared.job(options, 0, [1e-3]))
    assert result["head_parameters"] == 32 * 32 + 32 + 2 * 32 + 2


@pytest.mark.benchmarks
def test_learning_rate_is_chosen_on_the_validation_part(data, folders):
    setup = make_setup("instruction", data, folders)
    prepared = Prepared(setup, setup.family.tasks["seed-tasks"])
    loreft = options_of(PROTOCOL.contenders["loreft"], setup.family, prepared.task)
    result = train.run(prepared.job(loreft, 0, [1e-6, 1e-1]))
    losses = {float(rate): found["loss"] for rate, found in result["validation"].items()}
    assert result["learning_rate"] == min(losses, key=losses.get)
    assert losses[1e-1] != losses[1e-6]


@pytest.mark.benchmarks
@pytest.mark.parametrize("contender", ["base", "loreft"])
def test_exact_is_what_greedy_decoding_gives(contender, data, folders):
    """With all weights trained until a model has learned to answer, but not which of two answers is right."""
    setup = make_setup("commonsense", data, folders)
    prepared = Prepared(setup, setup.family.tasks["commonsense"])
    job = prepared.job(options_of(PROTOCOL.contenders[contender], setup.family, prepared.task), 0, [1e-2])
    learner = make_learner(job)
    learner.base.requires_grad_(True)
    train.train(learner, replace(job, batches=job.batches * 8), 1e-2)
    samples = job.validation
    exact = train.evaluate(learner, job, samples, generating=False)["exact"]
    length = max(len(sample.ids) - sample.prompt for sample in samples)
    generated = train.generate(learner, replace(job, max_new_tokens=length), samples)
    answers = [sample.ids[sample.prompt :] for sample in samples]
    assert exact == [new[: len(answer)] == answer for new, answer in zip(generated, answers, strict=True)]
    assert 0 < sum(exact) < len(exact)


def test_logits_at_answers(data, folders):
    setup = make_setup("instruction", data, folders)
    prepared = Prepared(setup, setup.family.tasks["seed-tasks"])
    job = prepared.job({"method": "base"}, 0, [])
    learner = make_learner(job)
    batch = collate(prepared.train[:4], job.pad, CPU)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        everywhere = learner.base(**inputs).logits
        with at_positions(learner.base, batch.answer):
            assert torch.equal(learner.base(**inputs).logits, everywhere[batch.answer])
        assert learner.base(**inputs).logits.shape == everywhere.shape


def test_mixed_basis(data, folders):
    """The same matrices, of which an optimizer sees other coordinates: the same turned back."""
    setup = make_setup("nlu", data, folders)
    prepared = Prepared(setup, setup.family.tasks["sst2"])
    options = options_of(PROTOCOL.contenders["paper-loreft"], setup.family, prepared.task)
    losses, parameters = [], []
    for mixed in ([], ["R", "W"]):
        job = prepared.job(options | {"init_weights": "reference", "dropout": 0.0, "mixed": mixed}, 0, [])
        learner = make_learner(job)
        samples = prepared.train[:4]
        losses.append(train.loss_of(learner, job, collate(samples, job.pad, CPU), samples))
        losses[-1].backward()
        unit = next(module for module in learner.model.modules() if isinstance(module, Intervention))
        parameters.append(dict(unit.named_parameters()))
    own, other = parameters
    assert losses[1].item() == pytest.approx(losses[0].item(), abs=1e-6)
    basis = unit.parametrizations._R[0].basis
    for name in ("_R", "_W"):
        gradient = other[f"parametrizations.{name}.original"].grad
        assert torch.allclose(gradient @ basis, own[name].grad, atol=1e-6)
        assert not torch.allclose(gradient, own[name].grad, rtol=0.1)


def test_edits_end_with_the_prompt(data, folders):
    """The answer's own tokens are not edited, so the keys that ReFT changes are the same with another answer."""
    setup = make_setup("commonsense", data, folders)
    prepared = Prepared(setup, setup.family.tasks["commonsense"])
    options = options_of(PROTOCOL.contenders["loreft"], setup.family, prepared.task) | {"init_weights": False}
    learner = make_learner(prepared.job(options, 0, []))
    sample = prepared.train[0]
    seen = []
    learner.base.model.layers[0]._reft.register_forward_hook(
        lambda module, args, output: seen.append((args[0], output))
    )
    with torch.no_grad():
        learner.answers(collate([sample], 0, CPU))
    [(before, after)] = seen
    edited = (before != after).any(-1)[0].nonzero()[:, 0].tolist()
    n = min(7, sample.prompt // 2)
    assert edited == [*range(n), *range(max(sample.prompt - 7, n), sample.prompt)]


@pytest.mark.benchmarks
def test_ablations(data, folders, tmp_path):
    setup = make_setup("nlu", data, folders)
    own, options = ablations.varied(setup, {"train": 8, "learning_rates": [1.0], "r": 2})
    assert (own.size["train"], own.family.training["learning_rates"], options) == (8, [1.0], {"r": 2})
    results = Results(tmp_path / "ablations.jsonl")
    few = {
        "layers": Ablation({"upper": {"layers_to_transform": "upper third"}, "all": {"layers_to_transform": None}}),
        "examples": Ablation({"4": {"train": 4}, "8": {"train": 8}}, ["base", "loreft"]),
    }
    for name in few:
        ablations.run_ablation(replace(PROTOCOL, ablations=few), setup, "sst2", name, [0], results)
    assert [record["sized"]["rows"]["train"] for record in results.records] == [12, 12, 4, 4, 8, 8]
    assert ablations.only(few["examples"], ["8"]) == Ablation({"8": {"train": 8}}, ["base", "loreft"])
    assert ablations.only(few["examples"], None) == few["examples"]
    page = tmp_path / "results.md"
    render.write(page, render.render(results.records, page))
    assert "Rows: 4 to 8 train, 6 validation, 4 sst2;" in page.read_text()
    assert (
        "## Ablation: layers, sst2" in page.read_text() and (tmp_path / "results/ablation-examples-sst2.svg").exists()
    )


@pytest.mark.benchmarks
@pytest.mark.parametrize("name", list(PROTOCOL.ablations))
def test_ablations_change_options_that_there_are(name, data, folders):
    setup = make_setup("nlu", data, folders)
    task = setup.family.tasks["sst2"]
    for changes in PROTOCOL.ablations[name].values.values():
        own, options = ablations.varied(setup, changes)
        given = options_of(PROTOCOL.contenders["paper-loreft"], own.family, task) | options
        assert count_trained(make_learner(Prepared(own, task).job(given, 0, [])))[0] > 0


def record_of(seed: int = 0, **settings) -> dict:
    """Of a run of LoReFT with a grid of three learning rates."""
    training = {"learning_rates": [1e-3, 3e-3, 9e-3], "batch_size": 4}
    what = {"family": "nlu", "task": "sst2", "name": "loreft", "seed": seed, "ablation": None, "value": None}
    sized = {"rows": {"train": 8, "sst2": 4}, "dropped": 0, "held_out": 0, "contradictory": 0, "epochs": 1}
    return what | {
        "metric": "accuracy",
        "settings": {"contender": {"method": "reft"}, "training": training, "size": {"train": 8}, "model": "m"}
        | settings,
        "learning_rate": 3e-3,
        "validation": {"0.003": {"loss": 0.5}},
        "tests": {"sst2": {"accuracy": 0.25 * seed}},
        "trainable_parameters": 1234,
        "head_parameters": 0,
        "sized": sized | {"tokens": {"mean": 5.0, "longest": 9}},
        "machine": {"cpu": "c", "threads": 1, "torch": "2"},
        "commit": "abc",
        "steps": 2,
        "seconds_a_step": 0.5,
        "peak_memory": 2**20,
    }


def test_table_of_a_family():
    """The mean of seeds and their standard deviation: 0 and 0.5 of accuracy in per cent."""
    [*_, row] = render.family_table([record_of(0), record_of(2)]).splitlines()
    assert row == "| loreft | 25.0 ± 35.4 | 0.500 ± 0.000 | 2 | 1,234 | 0.50 | 1 MiB | 0.003 |"
    edge = record_of() | {"learning_rate": 9e-3, "validation": {"0.009": {"loss": 0.5}}}
    assert render.family_table([edge]).splitlines()[-1].endswith("| 0.009 (edge) |")


def test_unlike_records_are_not_put_in_one_table(tmp_path):
    contender = {"contender": {"method": "lora"}}
    render.render([record_of(), record_of(1), record_of(**contender) | {"name": "lora"}], tmp_path / "page.md")
    for other in (record_of(1, size={"train": 9}), record_of(1, model="n"), record_of(1, **contender)):
        with pytest.raises(ValueError, match="nlu, sst2.*different settings"):
            render.render([record_of(), other], tmp_path / "page.md")
    with pytest.raises(ValueError, match="a seed comes twice"):
        render.render([record_of(), record_of()], tmp_path / "page.md")
    varied = {"ablation": "rank", "value": "1"}
    with pytest.raises(ValueError, match="rank, sst2, loreft 1.*different settings"):
        render.render([record_of() | varied, record_of(1, **contender) | varied], tmp_path / "page.md")
    render.render([record_of() | varied, record_of(**contender) | {**varied, "value": "2"}], tmp_path / "page.md")


def test_order_of_tables():
    """That of the protocol, not of the runs; ablations that it does not know come after those that it knows."""
    made = [
        record_of() | {"ablation": "rank", "value": "32"},
        record_of() | {"ablation": "unknown", "value": "b"},
        record_of() | {"ablation": "unknown", "value": "a"},
        record_of() | {"ablation": "rank", "value": "2"},
        record_of() | {"ablation": "positions", "value": "all"},
        record_of() | {"name": "lora-r1-qv"},
        record_of(1),
        record_of(),
        record_of() | {"family": "arithmetic", "task": "arithmetic"},
    ]
    assert render.in_order(made, PROTOCOL) == [made[at] for at in (4, 3, 0, 1, 2, 6, 7, 5, 8)]


def test_page_keeps_what_is_written_by_hand(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"Before\n{render.BEGIN}\nold\n{render.END}\nAfter\n")
    render.write(page, "new\n")
    assert page.read_text() == f"Before\n{render.BEGIN}\nnew\n{render.END}\nAfter\n"


# What may not be here


def test_data_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        find_folder("no/such/folder", "dataset")


@pytest.mark.benchmarks
def test_real_data():
    if not REAL_DATA.is_dir():
        pytest.skip(f"The real data is not at {REAL_DATA}.")
    for family in PROTOCOL.families.values():
        for task in family.tasks.values():
            for size in ("cpu", "full"):
                split = split_task(family, task, REAL_DATA, family.sizes[size])
                tested = [example for examples in split.tests.values() for example in examples]
                parts = [{question(example) for example in part} for part in (split.train, split.validation, tested)]
                assert all(parts) and all(not a & b for a, b in itertools.combinations(parts, 2))


@pytest.mark.benchmarks
def test_reference_sees_the_same_batches(data, folders):
    """By a worker in an environment with pyreft, both where prompts are short and where they are not."""
    python = os.environ.get("REFERENCE_PYTHON")
    if not python:
        pytest.skip("REFERENCE_PYTHON does not name the Python of an environment with pyreft.")
    for name in ("nlu", "arithmetic", "instruction"):  # the last with separate weights
        setup = make_setup(name, data, folders)
        prepared = Prepared(setup, next(iter(setup.family.tasks.values())))
        reference, own = (
            prepared.job(options_of(PROTOCOL.contenders[key], setup.family, prepared.task), 0, [1e-3])
            for key in ("loreft-pyreft", "loreft")
        )
        found, expected = run_elsewhere(python, reference), train.run(own)
        for key in ("batches", "trainable_parameters", "head_parameters", "steps"):
            assert found[key] == expected[key]


@pytest.mark.benchmarks
def test_reference_is_evaluated_without_dropout(data, folders):
    python = os.environ.get("REFERENCE_PYTHON")
    if not python:
        pytest.skip("REFERENCE_PYTHON does not name the Python of an environment with pyreft.")
    setup = make_setup("nlu", data, folders)
    prepared = Prepared(setup, next(iter(setup.family.tasks.values())))
    options = options_of(PROTOCOL.contenders["loreft-pyreft"], setup.family, prepared.task) | {"dropout": 0.9}
    job = prepared.job(options, 0, [1e-1])
    [samples] = job.tests.values()
    found = run_elsewhere(python, replace(job, tests={"once": samples, "again": samples}))
    assert found["tests"]["once"] == found["tests"]["again"]
