"""Mapping rules and errors, on checkpoints written by hand. `integration/parity/` has the peers' own."""

import json
import pickle
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from by_hand import ENCODER, gram_schmidt, make_gpt2, make_llama, random_ids
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from peft_reft.convert import convert_adapters, convert_pyreft, files
from peft_reft.convert.pyreft import Representation
from peft_reft.convert.save import with_orthonormal_rows

D, R = 32, 3


@pytest.fixture
def base(tmp_path) -> str:
    """The folder of a base model with three blocks that holds a config and no weights."""
    config = make_llama().config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def encoder(tmp_path) -> str:
    config = BertConfig(**ENCODER, num_labels=3, architectures=["BertForMaskedLM"])
    config.save_pretrained(tmp_path / "encoder")
    return str(tmp_path / "encoder")


def rotation(r: int = R, d: int = D) -> torch.Tensor:
    """Orthonormal rows [r, d]."""
    return gram_schmidt(torch.randn(r, d)).float()


def make_unit(kind: str = "Loreft", r: int = R, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """What an intervention of pyreft saves."""
    source = {"weight": torch.randn(r, D, dtype=dtype), "bias": torch.randn(r, dtype=dtype)}
    if kind == "Loreft":
        return source | {"rotate_layer": rotation(r).mT.contiguous()}
    assert kind in ("Noreft", "Nodireft")
    return {f"learned_source.{name}": t for name, t in source.items()} | {"proj_layer.weight": torch.randn(r, D)}


BLOCK = "layer_{}_comp_block_output_unit_pos_nunit_1"


def save_pyreft(folder: Path, layers, units, kind: str = "Loreft", component: str = "block_output", **config) -> Path:
    """A checkpoint as pyreft saves it: representations of these layers in order, each with its tensors."""
    folder.mkdir()
    seen: dict[str, int] = {}
    for layer, unit in zip(layers, units, strict=True):
        place = BLOCK.format(layer) if component == "block_output" else component.format(layer)
        place = place if component == "block_output" else f"comp_{place.replace('.', '_')}_unit_pos_nunit_1"
        seen[place] = seen.get(place, -1) + 1
        torch.save(unit, folder / f"intkey_{place}#{seen[place]}.bin")
    written = {
        "representations": [[layer, component.format(layer), "pos", 1, R, *[None] * 9] for layer in layers],
        "intervention_types": [f"<class 'pyreft.interventions.{kind}Intervention'>" for _ in layers],
    }
    (folder / "config.json").write_text(json.dumps(written | config))
    return folder


def converted(source, base, convert=convert_pyreft, **options) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """The config and the tensors of the PEFT adapter, the latter by `layer.unit.name`."""
    folder = Path(tempfile.mkdtemp(dir=Path(source).parent))
    convert(source, folder, base, **options)
    assert {file.name for file in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    tensors = load_file(folder / "adapter_model.safetensors")
    parts = {key: key.split(".") for key in tensors if "._reft." in key}
    own = {
        f"{p[p.index('_reft') - 1]}.{p[-2].removeprefix('_reft_')}.{p[-1].removeprefix('_')}": tensors[key]
        for key, p in parts.items()
    }
    return PeftConfig.from_pretrained(folder), own | {key: tensors[key] for key in tensors.keys() - parts.keys()}


def assert_unit(tensors, where: str, unit) -> None:
    """That a LoReFT of pyreft is what is saved for `layer.unit`."""
    for name, expected in {"R": 0.5 * unit["rotate_layer"].mT, "W": unit["weight"], "b": unit["bias"]}.items():
        torch.testing.assert_close(tensors[f"{where}.{name}"], expected.float(), atol=1e-5, rtol=1e-5)


# pyreft


def test_prefixes_come_first(tmp_path, base):
    units = [make_unit() for _ in range(4)]
    config, tensors = converted(save_pyreft(tmp_path / "a", [0, 2, 0, 2], units), base, positions="f2+l2")
    assert (config.intervention, config.positions, config.share_weights) == ("loreft", "f2+l2-middle", False)
    assert (config.r, config.layers_to_transform, config.task_type) == (R, [0, 2], "CAUSAL_LM")
    assert config.base_model_name_or_path == base
    for where, unit in zip(("0.prefix", "2.prefix", "0.suffix", "2.suffix"), units, strict=True):
        assert_unit(tensors, where, unit)


def test_order_is_that_of_sorted_keys(tmp_path, base):
    units, keys = [make_unit() for _ in range(2)], [BLOCK.format(0) + "#1", BLOCK.format(0) + "#0"]
    source = save_pyreft(tmp_path / "a", [0, 0], units, sorted_keys=keys)
    _, tensors = converted(source, base, positions="f2+l2")
    assert_unit(tensors, "0.prefix", units[1])
    assert_unit(tensors, "0.suffix", units[0])


@pytest.mark.parametrize("first_unit, first", [("prefix", 0), ("suffix", 1)])
def test_order_that_is_not_known_is_asked_for(tmp_path, base, first_unit, first):
    units = [make_unit() for _ in range(4)]
    source = save_pyreft(tmp_path / "a", [0, 0, 1, 1], units)
    with pytest.raises(ValueError, match=r"#0 and .*#1 edits the first tokens is not saved.* \(--first-unit\)"):
        converted(source, base, positions="f2+l2")
    _, tensors = converted(source, base, positions="f2+l2", first_unit=first_unit)
    assert_unit(tensors, "0.prefix", units[first])
    assert_unit(tensors, "1.suffix", units[3 - first])


def test_shared_and_all_layers(tmp_path, base):
    units = [make_unit() for _ in range(3)]
    source = save_pyreft(tmp_path / "a", [0, 1, 2], units)
    config, tensors = converted(source, base, positions="f2+l2", share_weights=True)
    assert config.share_weights and config.layers_to_transform is None and config.target_modules is None
    assert_unit(tensors, "2.unit", units[2])
    with pytest.raises(ValueError, match=r"share_weights=False does not fit the checkpoint, which has 1 intervention"):
        converted(source, base, positions="f2+l2", share_weights=False)
    for share_weights in (True, False, None):  # no matter where one end alone is edited
        assert_unit(converted(source, base, positions="f2", share_weights=share_weights)[1], "2.unit", units[2])


def test_one_intervention_each_may_be_of_one_end(tmp_path, base):
    """pyreft's own locations have the first half of them edit first tokens, unless weights are shared."""
    units = [make_unit() for _ in range(2)]
    source = save_pyreft(tmp_path / "a", [0, 1], units)
    with pytest.raises(ValueError, match=r"Each of the 2 modules has one intervention.*\(--share-weights\)"):
        converted(source, base, positions="f2+l2")
    config, tensors = converted(source, base, positions="f2+l2", share_weights=True)
    assert config.share_weights and config.layers_to_transform == [0, 1]
    assert_unit(tensors, "1.unit", units[1])
    source = save_pyreft(tmp_path / "b", [0, 1, 2], [make_unit()] * 3)  # of which there is no half
    assert converted(source, base, positions="f2+l2")[0].share_weights
    with pytest.raises(ValueError, match="first_unit='suffix' is for modules with two interventions"):
        converted(source, base, positions="f2+l2", first_unit="suffix")


@pytest.mark.parametrize("layers, positions", [([0, 0], "f2"), ([0, 0, 1], "f2+l2"), ([0, 0, 0], "f2+l2")])
def test_numbers_of_interventions_that_do_not_fit(tmp_path, base, layers, positions):
    source = save_pyreft(tmp_path / "a", layers, [make_unit() for _ in layers])
    with pytest.raises(ValueError, match="interventions each, but positions="):
        converted(source, base, positions=positions)


def test_ranks(tmp_path, base):
    units = [make_unit(r=r) for r in (2, 3, 2)]
    config, tensors = converted(save_pyreft(tmp_path / "a", [0, 1, -1], units), base, positions="l2")
    assert (config.r, config.rank_pattern, config.layers_to_transform) == (2, {"model.layers.1": 3}, None)
    assert_unit(tensors, "1.unit", units[1])
    assert_unit(tensors, "2.unit", units[2])


@pytest.mark.parametrize(
    "component, module", [("model.layers[{}].output", None), ("model.layers[{}].mlp.output", "mlp")]
)
def test_modules_named_by_paths(tmp_path, base, component, module):
    unit = make_unit()
    source = save_pyreft(tmp_path / "a", [1], [unit], component=component)
    config, tensors = converted(source, base, positions="f2")
    assert config.target_modules == ([f"model.layers.1.{module}"] if module else None)
    assert config.layers_to_transform == (None if module else [1])
    assert_unit(tensors, f"{module or 1}.unit", unit)


@pytest.mark.parametrize("component", ["mlp_activation", "block_input", "model.layers[{}].input"])
def test_other_components_are_refused(tmp_path, base, component):
    source = save_pyreft(tmp_path / "a", [1], [make_unit()], component=component)
    with pytest.raises(ValueError, match="component=.* cannot be converted: ReFT here edits tokens"):
        converted(source, base, positions="f2")
    with pytest.raises(ValueError, match="component='block_output', unit='h.pos' cannot be converted"):
        Representation(0, "block_output", "h.pos", 1).module  # noqa: B018


def test_bias_of_the_projection(tmp_path, base):
    """act(W h + b) - (R h + c): c is taken from b, which it cannot be where an activation stands between."""
    shift = torch.randn(R)
    unit = make_unit("Noreft") | {"proj_layer.bias": shift}
    source = save_pyreft(tmp_path / "a", [0], [unit], "Noreft")
    config, tensors = converted(source, base, positions="f2")
    assert config.intervention == "noreft"
    assert torch.equal(tensors["0.unit.b"], unit["learned_source.bias"] - shift)
    assert torch.equal(tensors["0.unit.R"], unit["proj_layer.weight"])
    with pytest.raises(ValueError, match="a bias of the projection .add_bias., which act_fn='gelu' keeps from b"):
        converted(source, base, positions="f2", act_fn="gelu")
    source = save_pyreft(tmp_path / "b", [0], [unit | {"proj_layer.bias": shift[:1].clone()}], "Noreft")
    with pytest.raises(ValueError, match=r"proj_layer.bias\) do not fit each other: R is \[3, 32\], and b is \[1\]"):
        converted(source, base, positions="f2")


def test_bias_that_pyreft_does_not_use(tmp_path, base):
    unit = make_unit("Nodireft") | {"proj_layer.bias": torch.randn(R)}
    config, tensors = converted(
        save_pyreft(tmp_path / "a", [0], [unit], "Nodireft"), base, positions="f2", act_fn="gelu"
    )
    assert (config.intervention, config.act_fn) == ("direft", "gelu")
    assert torch.equal(tensors["0.unit.b"], unit["learned_source.bias"])


def test_safetensors(tmp_path, base):
    unit = make_unit()
    source = save_pyreft(tmp_path / "a", [0], [unit])
    file = next(source.glob("intkey_*.bin"))
    save_file(unit, file.with_suffix(".safetensors"))
    file.unlink()
    assert_unit(converted(source, base, positions="f2")[1], "0.unit", unit)


def test_names_of_older_versions(tmp_path, base):
    units = [make_unit(), make_unit()]
    keys = [f"layer.0.comp.block_output.unit.pos.nunit.1#{number}" for number in (1, 0)]
    source = save_pyreft(tmp_path / "a", [0, 0], units, sorted_keys=keys)
    for key in keys:
        (source / f"intkey_{key.replace('.', '_')}.bin").rename(source / f"intkey_{key}.bin")
    _, tensors = converted(source, base, positions="f2+l2")
    assert_unit(tensors, "0.prefix", units[1])
    assert_unit(tensors, "0.suffix", units[0])


@pytest.mark.parametrize("kind", ["Loreft", "Noreft"])
def test_half_precision_is_widened(tmp_path, base, kind):
    unit = make_unit(kind, dtype=torch.bfloat16)
    _, tensors = converted(save_pyreft(tmp_path / "a", [0], [unit], kind), base, positions="f2")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    bias = unit["bias" if kind == "Loreft" else "learned_source.bias"]
    torch.testing.assert_close(tensors["0.unit.b"], bias.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("intervention", ["loreft", "direft_orthogonal", "lobireft"])
def test_rotation_that_was_rounded_gives_the_same_edit(intervention):
    unit = {"R": rotation().bfloat16().float(), "W": torch.randn(R, D), "b": torch.randn(R)}
    if intervention == "lobireft":
        del unit["W"]
    h = torch.randn(5, D)

    def edit(R, b, W=None):
        source = b if W is None else h @ W.mT + b
        return (source - h @ R.mT if intervention == "loreft" else source) @ R

    found = with_orthonormal_rows(unit, intervention, None)
    torch.testing.assert_close(found["R"] @ found["R"].mT, torch.eye(R), atol=1e-6, rtol=0)
    torch.testing.assert_close(edit(**found), edit(**unit), atol=1e-5, rtol=0)
    assert (edit(**unit | {"R": found["R"]}) - edit(**unit)).abs().max() > 1e-4, "rounding is too small to be seen"


def test_rotation_before_an_activation_is_not_mended():
    unit = {"R": rotation().bfloat16().float(), "W": torch.randn(R, D), "b": torch.randn(R)}
    found = with_orthonormal_rows(unit, "loreft", "gelu")
    assert torch.equal(found["W"], unit["W"]) and torch.equal(found["b"], unit["b"])


def test_rotation_that_is_none(tmp_path, base):
    unit = make_unit() | {"rotate_layer": torch.randn(D, R)}
    with pytest.raises(ValueError, match="The projection of loreft has no orthonormal rows"):
        converted(save_pyreft(tmp_path / "a", [0], [unit]), base, positions="f2")


@pytest.mark.parametrize(
    "kind, name, change, message",
    [
        ("Loreft", "weight", lambda t: t[:2], r"do not fit each other: R is \[3, 32\], and W is \[2, 32\]"),
        ("Loreft", "weight", lambda t: t[:, :9], r"do not fit each other: R is \[3, 32\], and W is \[3, 9\]"),
        ("Loreft", "bias", lambda t: t[:2], r"do not fit each other: R is \[3, 32\], and b is \[2\], not \[3\]"),
        ("Loreft", "rotate_layer", lambda t: t[:, :2], r"do not fit each other: R is \[2, 32\]"),
        ("Loreft", "rotate_layer", lambda t: t[0], r"'rotate_layer' of .* is \[3\], and should have 2 dim"),
        ("Loreft", "rotate_layer", lambda t: t[0, 0], r"'rotate_layer' of .* is \[\], and should have 2 dim"),
        ("Noreft", "proj_layer.weight", lambda t: t[:2], r"do not fit each other: R is \[2, 32\]"),
        ("Loreft", "weight", lambda t: t * float("nan"), "'weight' of .* holds values that are not finite"),
        ("Noreft", "learned_source.bias", lambda t: t / 0, "'learned_source.bias' of .* are not finite"),
    ],
)
def test_tensors_that_are_wrong(tmp_path, base, kind, name, change, message):
    unit = make_unit(kind)
    source = save_pyreft(tmp_path / "a", [0], [unit | {name: change(unit[name]).clone()}], kind)
    with pytest.raises(ValueError, match=message):
        converted(source, base, positions="f2")


def test_tensors_that_have_no_place(tmp_path, base):
    """Those of an activation, without which the edit is another."""
    unit = make_unit("Noreft") | {"embed_dim": torch.tensor(D), "interchange_dim": torch.tensor(D)}
    assert converted(save_pyreft(tmp_path / "a", [0], [unit], "Noreft"), base, positions="f2")
    source = save_pyreft(tmp_path / "b", [0], [unit | {"act_fn.weight": torch.ones(1)}], "Noreft")
    with pytest.raises(ValueError, match="holds act_fn.weight, which cannot be converted"):
        converted(source, base, positions="f2", act_fn="prelu")
    source = save_pyreft(tmp_path / "c", [0], [unit], "Noreft")
    with pytest.raises(ValueError, match="act_fn='prelu' has parameters"):
        converted(source, base, positions="f2", act_fn="prelu")


def test_nothing_is_written_over(tmp_path, base):
    source = save_pyreft(tmp_path / "a", [0], [make_unit()])
    config = (source / "config.json").read_text()
    with pytest.raises(ValueError, match="a is not empty: nothing there is written over"):
        convert_pyreft(source, source, base, "f2")
    assert (source / "config.json").read_text() == config and not (source / "adapter_config.json").exists()


def test_classes_that_cannot_be_converted(tmp_path, base):
    source = save_pyreft(tmp_path / "a", [0], [make_unit()], "Vanilla")
    with pytest.raises(
        ValueError, match="are of VanillaIntervention: one class .* pyreft's LoreftIntervention, Noreft"
    ):
        converted(source, base, positions="f2")
    types = [f"<class 'pyreft.interventions.{kind}Intervention'>" for kind in ("Loreft", "Noreft")]
    source = save_pyreft(tmp_path / "b", [0, 1], [make_unit()] * 2, intervention_types=types)
    with pytest.raises(ValueError, match="are of LoreftIntervention, NoreftIntervention: one class"):
        converted(source, base, positions="f2")


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize("save", [torch.save, lambda unit, file: Path(file).write_bytes(pickle.dumps(unit))])
def test_pickle_with_code_is_refused(tmp_path, base, save, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = save_pyreft(tmp_path / "a", [0], [make_unit()])
    save(make_unit() | {"more": Malicious()}, next(source.glob("intkey_*.bin")))
    with pytest.raises(ValueError, match=r"intkey_.*\.bin is refused: it is a pickle with more than tensors in it"):
        converted(source, base, positions="f2")
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "content, message",
    [(b"text", "is refused|cannot be read"), ([torch.zeros(1)], "holds a list"), ({"rotate_layer": 1}, "not tensors")],
)
def test_files_that_hold_something_else(tmp_path, base, content, message):
    source = save_pyreft(tmp_path / "a", [0], [make_unit()])
    file = next(source.glob("intkey_*.bin"))
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(ValueError, match=message):
        converted(source, base, positions="f2")


def test_folders_that_are_no_checkpoint_of_pyreft(tmp_path, base):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no checkpoint of pyreft: it has no config.json \(found: nothing\)"):
        convert_pyreft(tmp_path / "empty", tmp_path / "x", base, "f2")
    with pytest.raises(ValueError, match=r"representations and intervention_types \(found: architectures, "):
        convert_pyreft(base, tmp_path / "x", base, "f2")
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is no JSON"):
        convert_pyreft(tmp_path / "empty", tmp_path / "x", base, "f2")
    with pytest.raises(ValueError, match="nowhere/at/all is neither a folder nor a repository"):
        convert_pyreft("nowhere/at/all", tmp_path / "x", base, "f2")
    source = save_pyreft(tmp_path / "a", [0], [make_unit()])
    next(source.glob("intkey_*.bin")).unlink()
    with pytest.raises(ValueError, match="intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin, .* is missing"):
        convert_pyreft(source, tmp_path / "x", base, "f2")
    source = save_pyreft(tmp_path / "b", [0], [{"weight": torch.zeros(R, D)}])
    with pytest.raises(ValueError, match=r"has no tensor 'rotate_layer' \(found: weight\)"):
        convert_pyreft(source, tmp_path / "x", base, "f2")
    (source / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has interventions \(intkey_\*\) and no config.json, as pyreft's trainer"):
        convert_pyreft(source, tmp_path / "x", base, "f2")
    for entry in (None, "x"):
        source = save_pyreft(tmp_path / f"c{entry}", [0], [make_unit()])
        config = json.loads((source / "config.json").read_text())
        config["representations"][0][0] = entry
        (source / "config.json").write_text(json.dumps(config | {"sorted_keys": [1]}))
        with pytest.raises(ValueError, match=f"layer={entry!r} of a representation in config.json is no index"):
            convert_pyreft(source, tmp_path / "x", base, "f2")
    assert not (tmp_path / "x").exists()


def test_base_models_that_do_not_fit(tmp_path, base):
    with pytest.raises(ValueError, match="edits layer 7, but the base model has 3"):
        convert_pyreft(save_pyreft(tmp_path / "a", [7], [make_unit()]), tmp_path / "x", base, "f2")
    source = save_pyreft(tmp_path / "b", [0], [make_unit()], component="transformer.h[{}].output")
    with pytest.raises(ValueError, match="edits 'transformer.h.0', which is no module of LlamaForCausalLM"):
        convert_pyreft(source, tmp_path / "x", base, "f2")
    wide = make_unit() | {"rotate_layer": rotation(d=2 * D).mT, "weight": torch.zeros(R, 2 * D)}
    with pytest.raises(ValueError, match=r"R is \[3, 64\], not \[3, 32\]"):
        convert_pyreft(save_pyreft(tmp_path / "c", [0], [wide]), tmp_path / "x", base, "f2")
    source = save_pyreft(tmp_path / "d", [0], [make_unit()])
    with pytest.raises(ValueError, match=r"no class for .*task_type='TOKEN_CLASSES': give another"):
        convert_pyreft(source, tmp_path / "x", base, "f2", task_type="TOKEN_CLASSES")


def test_hub(tmp_path, base, monkeypatch):
    source, asked = save_pyreft(tmp_path / "a", [0], [make_unit()]), []

    def snapshot_download(repo_id, allow_patterns):
        asked.append((repo_id, allow_patterns))
        return str(source)

    monkeypatch.setattr(files, "snapshot_download", snapshot_download)
    convert_pyreft("user/adapter", tmp_path / "adapter", base, "f2")
    assert asked == [
        ("user/adapter", ["config.json"]),  # so that nothing large is brought of what is no such checkpoint
        ("user/adapter", ["config.json", "intkey_*", "pytorch_model.bin"]),
    ]


# Heads


def make_head(encoder: str) -> dict[str, torch.Tensor]:
    config = BertConfig.from_pretrained(encoder)
    model = BertForSequenceClassification(config)
    return {name: torch.randn_like(p) for name, p in model.named_parameters() if name.startswith("classifier.")}


def test_head_of_a_classifier(tmp_path, encoder):
    source = save_pyreft(tmp_path / "a", [0, 1], [make_unit()] * 2, component="bert.encoder.layer[{}].output")
    head = make_head(encoder)
    torch.save(head, source / "pytorch_model.bin")
    config, tensors = converted(source, encoder, positions="f2", task_type="SEQ_CLS")
    assert (config.task_type, config.layers_to_transform) == ("SEQ_CLS", None)
    assert torch.equal(tensors["base_model.model.classifier.weight"], head["classifier.weight"])
    with pytest.warns(UserWarning, match="No trained head is converted"):
        config, tensors = converted(source, encoder, positions="f2", task_type="SEQ_CLS", head=False)
    assert config.task_type is None and config.modules_to_save is None
    assert not any("classifier" in key for key in tensors)


def test_labels_of_a_head(tmp_path, encoder):
    source = save_pyreft(tmp_path / "a", [0, 1], [make_unit()] * 2, component="bert.encoder.layer[{}].output")
    head = {"classifier.weight": torch.randn(7, D), "classifier.bias": torch.randn(7)}
    torch.save(head, source / "pytorch_model.bin")
    _, tensors = converted(source, encoder, positions="f2", task_type="SEQ_CLS", num_labels=7)
    assert torch.equal(tensors["base_model.model.classifier.weight"], head["classifier.weight"])


def test_heads_that_do_not_fit(tmp_path, encoder):
    source = save_pyreft(tmp_path / "a", [0, 1], [make_unit()] * 2, component="bert.encoder.layer[{}].output")
    head = make_head(encoder)
    for wrong, message in (
        ({"heads.glue.1.weight": torch.zeros(1)}, r"'heads.glue.1.weight' \[1\], .* is no parameter of the head"),
        (head | {"classifier.weight": torch.zeros(2, D)}, r"'classifier.weight' \[2, 32\], .* \(--num-labels\)"),
        (head | {"bert.pooler.dense.bias": torch.zeros(D)}, "'bert.pooler.dense.bias' .* is no parameter of the head"),
        ({"classifier.weight": head["classifier.weight"]}, "'classifier.bias' is not saved with the rest"),
    ):
        torch.save(wrong, source / "pytorch_model.bin")
        with pytest.raises(ValueError, match=message):
            converted(source, encoder, positions="f2", task_type="SEQ_CLS")


# adapters


CONFIG = dict(
    architecture="reft",
    dropout=0.05,
    layers="all",
    non_linearity=None,
    orthogonality=True,
    prefix_positions=3,
    suffix_positions=2,
    r=R,
    tied_weights=False,
)


def save_adapters(folder: Path, modules: str = "model.layers.{}", units: int = 2, **config) -> tuple[Path, dict]:
    """A checkpoint as adapters saves it, and its tensors by `layer.unit.name`, R as it is used."""
    folder.mkdir()
    config = CONFIG | config
    written, used = {}, {}
    for layer in range(3):
        for unit in range(units):
            layers = nn.ModuleDict({"learned_source": nn.Linear(D, R), "projection": nn.Linear(D, R, bias=False)})
            if config["orthogonality"]:
                nn.utils.parametrizations.orthogonal(layers["projection"])
                original = layers["projection"].get_parameter("parametrizations.weight.original")
                original.data += 0.1 * torch.randn(R, D).triu(1)  # trained
            prefix = f"{modules.format(layer)}.reft_layer.refts.name.units.{unit}."
            written |= {prefix + name: tensor for name, tensor in layers.state_dict().items()}
            length = 0.5 if config["orthogonality"] else 1
            used[f"{layer}.{unit}.R"] = length * layers["projection"].weight.detach()
            used[f"{layer}.{unit}.W"] = layers["learned_source"].weight.detach()
            used[f"{layer}.{unit}.b"] = layers["learned_source"].bias.detach()
    torch.save(written, folder / "pytorch_adapter.bin")
    (folder / "adapter_config.json").write_text(json.dumps({"config": config, "model_class": "LlamaForCausalLM"}))
    return folder, used


def assert_units(tensors, used, names: dict[str, int]) -> None:
    assert len(tensors) == 9 * len(names)
    for name, number in names.items():
        for layer in range(3):
            for kind in "RWb":
                found, expected = tensors[f"{layer}.{name}.{kind}"], used[f"{layer}.{number}.{kind}"]
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options, positions, names",
    [
        ({}, "f3+l2", {"prefix": 0, "suffix": 1}),
        ({"suffix_positions": 0}, "f3", {"unit": 0}),
        ({"prefix_positions": 0}, "l2", {"unit": 1}),
        ({"tied_weights": True, "units": 1}, "f3+l2", {"unit": 0}),
        ({"tied_weights": True, "units": 1, "prefix_positions": 0}, "l2", {"unit": 0}),
    ],
)
def test_units_of_adapters(tmp_path, base, options, positions, names):
    source, used = save_adapters(tmp_path / "a", **options)
    config, tensors = converted(source, base, convert_adapters)
    assert (config.intervention, config.positions, config.dropout) == ("loreft", positions, 0.05)
    assert config.share_weights == ("unit" in names)
    assert_units(tensors, used, names)


@pytest.mark.parametrize("intervention", ["noreft", "direft"])
def test_projection_that_is_not_orthogonal(tmp_path, base, intervention):
    source, used = save_adapters(tmp_path / "a", orthogonality=False, non_linearity="LeakyReLU")
    with pytest.raises(
        ValueError, match=r"Say what was trained: intervention='noreft' or 'direft' \(--intervention\)"
    ):
        converted(source, base, convert_adapters)
    with pytest.raises(ValueError, match="intervention='loreft' is not possible for this checkpoint"):
        converted(source, base, convert_adapters, intervention="loreft")
    config, tensors = converted(source, base, convert_adapters, intervention=intervention)
    assert (config.intervention, config.act_fn) == (intervention, "leaky_relu")
    assert_units(tensors, used, {"prefix": 0, "suffix": 1})


@pytest.mark.parametrize("modules, task_type", [("layers.{}", "CAUSAL_LM"), ("model.layers.{}", "FEATURE_EXTRACTION")])
def test_names_of_another_class_around_the_model(tmp_path, base, modules, task_type):
    """With a head around it or not, the names of the same modules begin otherwise."""
    source, used = save_adapters(tmp_path / "a", modules=modules)
    config, tensors = converted(source, base, convert_adapters, task_type=task_type)
    assert (config.task_type, config.target_modules) == (task_type, None)
    assert_units(tensors, used, {"prefix": 0, "suffix": 1})


def test_head_of_a_language_model_is_left_to_the_base_model(tmp_path, base):
    """adapters saves it, untrained."""
    source, used = save_adapters(tmp_path / "a")
    torch.save({"lm_head.weight": torch.zeros(64, D)}, source / "pytorch_model_head.bin")
    config, tensors = converted(source, base, convert_adapters)
    assert config.modules_to_save is None
    assert_units(tensors, used, {"prefix": 0, "suffix": 1})


def test_folders_that_are_no_checkpoint_of_adapters(tmp_path, base):
    with pytest.raises(
        ValueError, match=r"no checkpoint of adapters: it has no adapter_config.json \(found: config.json"
    ):
        convert_adapters(base, tmp_path / "x", base)
    source, _ = save_adapters(tmp_path / "a", architecture="lora")
    with pytest.raises(ValueError, match="the architecture in its adapter_config.json is 'lora'"):
        convert_adapters(source, tmp_path / "x", base)
    (source / "adapter_config.json").write_text(json.dumps({"config": {"architecture": "reft"}}))
    with pytest.raises(
        ValueError, match="its adapter_config.json has no dropout, layers, non_linearity, orthogonality, prefix_"
    ):
        convert_adapters(source, tmp_path / "x", base)
    (source / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ValueError, match="is a PEFT adapter already, of type LORA"):
        convert_adapters(source, tmp_path / "x", base)
    source, _ = save_adapters(tmp_path / "b")
    torch.save({"model.layers.0.lora_A": torch.zeros(1)}, source / "pytorch_adapter.bin")
    with pytest.raises(ValueError, match="'model.layers.0.lora_A' is no tensor of a ReFT of adapters"):
        convert_adapters(source, tmp_path / "x", base)
    (source / "pytorch_adapter.bin").unlink()
    with pytest.raises(ValueError, match="has no tensors in adapter.safetensors or pytorch_adapter.bin"):
        convert_adapters(source, tmp_path / "x", base)
    source, _ = save_adapters(tmp_path / "d", layers=[0, 2])
    with pytest.raises(ValueError, match=r"not whole: its config has layers=\[0, 2\], and .* model.layers.2.$"):
        convert_adapters(source, tmp_path / "x", base)
    source, _ = save_adapters(tmp_path / "e", tied_weights=True)
    with pytest.raises(ValueError, match="tied_weights is true, and model.layers.0 has several units"):
        convert_adapters(source, tmp_path / "x", base)
    source, _ = save_adapters(tmp_path / "f", non_linearity=3)
    with pytest.raises(ValueError, match="non_linearity=3 in adapter_config.json is no name"):
        convert_adapters(source, tmp_path / "x", base)
    source, _ = save_adapters(tmp_path / "g")
    tensors = torch.load(source / "pytorch_adapter.bin")
    whole = {key: tensor for key, tensor in tensors.items() if ".layers.1." not in key}
    torch.save(whole, source / "pytorch_adapter.bin")
    with pytest.raises(ValueError, match="it edits all layers, and has no tensors of model.layers.1"):
        convert_adapters(source, tmp_path / "x", base)
    key = "model.layers.0.reft_layer.refts.name.units.0.projection.parametrizations.weight.0.base"
    torch.save(tensors | {key: torch.zeros(R, R)}, source / "pytorch_adapter.bin")
    with pytest.raises(ValueError, match=r"parametrizations.weight.0.base' of .* is \[3, 3\], not \[32, 32\]"):
        convert_adapters(source, tmp_path / "x", base)
    source, _ = save_adapters(tmp_path / "c", units=1)
    with pytest.raises(ValueError, match="model.layers.0, unit 1 has no tensor"):
        convert_adapters(source, tmp_path / "x", base)


# The adapter


def test_loads_and_edits(tmp_path):
    """The edit of pyreft's formula, h + R^T (W h + b - R h), at the last prompt token of the last block."""
    model = make_gpt2()
    model.save_pretrained(tmp_path / "base")
    unit = make_unit()
    source = save_pyreft(tmp_path / "a", [-1], [unit])
    convert_pyreft(source, tmp_path / "adapter", str(tmp_path / "base"), "l1")
    seen = SimpleNamespace()
    handle = model.transformer.h[-1].register_forward_hook(lambda module, args, out: setattr(seen, "h", out))
    ids = random_ids()
    with torch.no_grad():
        model(ids)
        handle.remove()
        h = (seen.h[0] if isinstance(seen.h, tuple) else seen.h)[:, -1]
        source_of_h = h @ unit["weight"].mT + unit["bias"]
        edited = h + (source_of_h - h @ unit["rotate_layer"]) @ unit["rotate_layer"].mT
        expected = model.lm_head(model.transformer.ln_f(edited))
        adapted = PeftModel.from_pretrained(model, tmp_path / "adapter")
        logits = adapted(ids).logits[:, -1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)
