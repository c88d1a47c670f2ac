import runpy
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from peft_reft.cli import convert, env
from peft_reft.cli import main as cli
from peft_reft.upstream import PATCHES
from peft_reft.upstream.patch import NO_PATCHES


@pytest.fixture
def calls(monkeypatch) -> dict[str, dict]:
    """The arguments of the functions that the commands call."""
    calls: dict[str, dict] = {}
    for name in ("convert_pyreft", "convert_adapters"):
        monkeypatch.setattr(convert, name, lambda name=name, **options: calls.update({name: options}))
    return calls


def test_convert_pyreft(calls, capsys):
    command = "convert pyreft src dst --base-model base --positions f7+l7 --no-share-weights --first-unit suffix"
    assert cli.main([*command.split(), *"--act-fn gelu --task-type SEQ_CLS --num-labels 3 --no-head".split()]) == 0
    assert calls["convert_pyreft"] == dict(
        source="src",
        destination="dst",
        base_model="base",
        positions="f7+l7",
        share_weights=False,
        first_unit="suffix",
        act_fn="gelu",
        task_type="SEQ_CLS",
        num_labels=3,
        head=False,
    )
    assert "Wrote the PEFT adapter to dst." in capsys.readouterr().out


@pytest.mark.parametrize("option, share_weights", [([], None), (["--share-weights"], True)])
def test_share_weights(calls, option, share_weights):
    assert cli.main(["convert", "pyreft", "src", "dst", "--base-model", "base", "--positions", "f2", *option]) == 0
    assert calls["convert_pyreft"]["share_weights"] is share_weights


def test_convert_adapters(calls):
    assert cli.main("convert adapters src dst --base-model base --intervention direft".split()) == 0
    assert calls["convert_adapters"] == dict(
        source="src",
        destination="dst",
        base_model="base",
        intervention="direft",
        task_type=None,
        num_labels=None,
        head=True,
    )


@pytest.mark.parametrize(
    "command, message",
    [
        ("convert pyreft src dst --base-model base", "pyreft does not save positions: say which tokens"),
        ("convert pyreft src dst --positions f2", "required: --base-model"),
        ("convert pyreft src dst --base-model base --positions f2 --first-unit third", "invalid choice: 'third'"),
        ("convert swift src dst", "invalid choice: 'swift'"),
        ("", "required: command"),
    ],
)
def test_wrong_commands(calls, capsys, command, message):
    with pytest.raises(SystemExit) as exit:
        cli.main(command.split())
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert not calls


def test_errors_are_printed(tmp_path, capsys):
    command = f"convert adapters {tmp_path} {tmp_path}/x --base-model base"
    assert cli.main(command.split()) == 1
    assert capsys.readouterr().err == (
        f"peft-reft: error: {tmp_path} is no checkpoint of adapters: it has no adapter_config.json (found: nothing).\n"
    )


def test_env(capsys, monkeypatch):
    """The versions, and each patch with its reason and its issue."""
    versions = {"trl": "1.2.3"}
    monkeypatch.setattr(env, "version", lambda name: versions.get(name) or absent(name))
    assert cli.main(["env"]) == 0
    report = capsys.readouterr().out
    for line in ("- peft_reft: 0.1.0", "- trl: 1.2.3", "- bitsandbytes: not installed", "- Python: 3.", "- CUDA: "):
        assert f"{line}" in report
    for patch in PATCHES:
        assert f"- `{patch.target}`: {patch.why} ({patch.issue})" in report
    monkeypatch.setenv(NO_PATCHES, "1")
    assert cli.main(["env"]) == 0
    report = capsys.readouterr().out
    assert "PeftModel.load_adapter" not in report and report.count("- none (PEFT_REFT_NO_PATCHES=1 leaves them") == 2


def absent(name):
    raise PackageNotFoundError(name)


def test_entry_point():
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert '[project.scripts]\npeft-reft = "peft_reft.cli.main:main"\n' in project


def test_run_as_a_module(tmp_path, monkeypatch, capsys):
    command = ["convert", "adapters", str(tmp_path), "x", "--base-model", "base"]
    monkeypatch.setattr(sys, "argv", ["peft_reft.cli", *command])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("peft_reft.cli", run_name="__main__")
    assert exit.value.code == 1
    assert "it has no adapter_config.json" in capsys.readouterr().err
