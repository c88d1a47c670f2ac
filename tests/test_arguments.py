import dataclasses
import json
from dataclasses import dataclass, field

import pytest
from peft import PeftConfig
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

pytest.importorskip("trl", reason="needs the extra `trl`")

from trl import ModelConfig, ScriptArguments, get_quantization_config

from peft_reft import ReftConfig
from peft_reft.arguments import ReftParser


@dataclass
class Training(TrainingArguments):
    """As TRL's configs: bf16 unless fp16 or told otherwise."""

    output_dir: str = field(default="out")
    bf16: bool | None = field(default=None, metadata={"help": "bf16"})

    def __post_init__(self):
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        super().__post_init__()


@dataclass
class Rewards:
    reward: str = field(default="brevity", metadata={"help": "What is rewarded."})


def make_parser():
    return ReftParser((ScriptArguments, Training, ModelConfig, Rewards), prog="train.py")


def config_of(*arguments):
    reft_args, *others = make_parser().parse_args_and_config([*arguments])
    assert [type(other).__name__ for other in others] == ["ScriptArguments", "Training", "ModelConfig", "Rewards"]
    return reft_args.peft_config(task_type="CAUSAL_LM")


def test_defaults_are_those_of_the_config():
    assert config_of() == ReftConfig(task_type="CAUSAL_LM")


# Arguments for every field of the config, and the values they say
SAID = {
    "intervention": (["direft"], "direft"),
    "r": (["3"], 3),
    "rank_pattern": (['{"layers.1": 2}'], {"layers.1": 2}),
    "positions": (["f2+l5"], "f2+l5"),
    "share_weights": ([], True),
    "layers_to_transform": (["0", "-1"], [0, -1]),
    "layers_pattern": (["layers"], ["layers"]),
    "target_modules": (["mlp", "self_attn"], ["mlp", "self_attn"]),
    "exclude_modules": (["layers.2.mlp"], ["layers.2.mlp"]),
    "dropout": (["0.1"], 0.1),
    "act_fn": (["gelu"], "gelu"),
    "init_weights": (["reference"], "reference"),
    "standardize": (["false"], False),
    "modules_to_save": (["lm_head", "norm"], ["lm_head", "norm"]),
    "trainable_token_indices": (["[1, 2]"], [1, 2]),
}


def test_every_field_has_an_argument():
    own = {f.name for f in dataclasses.fields(ReftConfig)} - {f.name for f in dataclasses.fields(PeftConfig)}
    own -= {"base_adapters", "format"}  # which are found, not given
    assert SAID.keys() == own
    arguments = [word for name, (words, _) in SAID.items() for word in [f"--reft_{name}", *words]]
    config = config_of(*arguments)
    assert config == ReftConfig(task_type="CAUSAL_LM", **{name: value for name, (_, value) in SAID.items()})


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--reft_target_modules", r".*layers\.[01]\.mlp"], dict(target_modules=r".*layers\.[01]\.mlp")),
        (["--reft_target_modules", "mlp"], dict(target_modules=["mlp"])),
        (["--reft_exclude_modules", r".*\.2"], dict(exclude_modules=r".*\.2")),
        (["--reft_init_weights", "false"], dict(init_weights=False)),
        (["--reft_trainable_token_indices", '{"embed": [1]}'], dict(trainable_token_indices={"embed": [1]})),
        (["--reft_share_weights", "false"], dict(share_weights=False)),
    ],
)
def test_other_forms(arguments, options):
    assert config_of(*arguments) == ReftConfig(task_type="CAUSAL_LM", **options)


def test_wrong_value():
    with pytest.raises(ValueError, match="positions='q7' cannot be read"):
        config_of("--reft_positions", "q7")


@pytest.mark.parametrize("arguments", [["--use_peft", "--lora_r", "8"], ["--lora-r=8"], ["--use_dora", "true"]])
def test_arguments_of_lora_are_errors(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        make_parser().parse_args_and_config(arguments)
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert "train.py: error: " in message and "arguments of LoRA" in message and "--reft_r" in message
    assert all(word.partition("=")[0] in message for word in arguments if word.startswith("--"))
    assert message.count("\n") < 6


def test_lora_in_a_config_file(tmp_path):
    (tmp_path / "config.yaml").write_text(json.dumps({"lora_r": 8, "reft_r": 3}))
    with pytest.raises(ValueError, match="Unknown arguments from config file.*--lora_r"):
        make_parser().parse_args_and_config(["--config", str(tmp_path / "config.yaml")])
    (tmp_path / "config.yaml").write_text(json.dumps({"reft_r": 3, "reft_layers_to_transform": [0, -1]}))
    assert config_of("--config", str(tmp_path / "config.yaml")).layers_to_transform == [0, -1]


def test_model_arguments_are_trls():
    [_, _, model_args, _] = make_parser().parse_args_and_config(["--load_in_4bit", "--dtype", "bfloat16"])[1:]
    assert isinstance(model_args, ModelConfig) and not model_args.use_peft
    assert get_quantization_config(model_args).load_in_4bit


def printed(capsys, option):
    with pytest.raises(SystemExit) as error:
        make_parser().parse_args_and_config([option])
    assert error.value.code == 0
    return capsys.readouterr().out


def test_help(capsys):
    text = printed(capsys, "--help")
    options = [line.split()[0].rstrip(",") for line in text.splitlines() if line.startswith("  -")]
    options.remove("--no_reft_standardize")  # which argparse adds
    assert options[1 : len(SAID) + 1] == [f"--reft_{name}" for name in SAID]
    assert {"--dataset_name", "--model_name_or_path", "--reward", "--load_in_4bit", "--help_all"} <= {*options}
    assert len(text.splitlines()) < 140 and "such as --output_dir, --learning_rate" in text
    assert "--learning_rate" not in options and "lora" not in text
    assert "(default: f7+l7)" in text and "'f7+l7' for the first and last seven of the prompt" in " ".join(
        text.split()
    )


def test_full_help(capsys):
    text = printed(capsys, "--help_all")
    options = [line.split()[0].rstrip(",") for line in text.splitlines() if line.startswith("  -")]
    options.remove("--no_reft_standardize")  # which argparse adds
    assert options[1 : len(SAID) + 1] == [f"--reft_{name}" for name in SAID]
    assert {"--learning_rate", "--model_name_or_path", "--reward"} <= {*options} and "lora" not in text


def test_bf16_where_the_device_has_it(tmp_path):
    assert make_parser().parse_args_and_config([])[2].bf16 is is_torch_bf16_gpu_available()
    (tmp_path / "config.yaml").write_text(json.dumps({"bf16": True, "use_cpu": True}))
    assert make_parser().parse_args_and_config(["--config", str(tmp_path / "config.yaml")])[2].bf16 is True
    assert make_parser().parse_args_and_config(["--bf16", "true", "--use_cpu"])[2].bf16 is True
    assert len(ReftParser((Rewards,)).parse_args_and_config([])) == 2  # without a training config nothing is added
