"""Reinforcement learning with ReFT: TRL's own scripts/grpo.py, with ReFT in place of LoRA.

Any causal LM, any data set with a column `prompt`, and rewards: functions of `trl.rewards` (`accuracy_reward` needs
the package math-verify), or your own by import path:

    python examples/grpo.py \\
        --model_name_or_path Qwen/Qwen3-0.6B \\
        --dataset_name trl-lib/DeepMath-103K --reward_funcs accuracy_reward \\
        --reft_r 8 --reft_positions f7+l7 \\
        --max_steps 500 --per_device_train_batch_size 8 --num_generations 8 \\
        --max_completion_length 512 --output_dir Qwen3-0.6B-ReFT-GRPO --push_to_hub

Completions are sampled by transformers with the adapter in place. vLLM knows no ReFT adapters: leave `--use_vllm` off.
"""

import importlib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, get_quantization_config

from peft_reft import last_whole_checkpoint
from peft_reft.arguments import ReftParser

FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class RewardArguments:
    """What is rewarded."""

    reward_funcs: list[str] = field(
        default_factory=lambda: ["accuracy_reward"],
        metadata={"help": "Functions of trl.rewards, or import paths of your own such as my_rewards.brevity."},
    )


def load_data(script_args):
    if script_args.dataset_name is None:
        raise ValueError("Name the data with --dataset_name: a Hub id, a folder, or a file.")
    if Path(script_args.dataset_name).is_file():
        builder = FILE_TYPES[Path(script_args.dataset_name).suffix]
        return load_dataset(builder, data_files=script_args.dataset_name, streaming=script_args.dataset_streaming)
    return load_dataset(
        script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
    )


def load_reward(name):
    module, _, function = name.rpartition(".")
    return getattr(importlib.import_module(module or "trl.rewards"), function)


def main(reft_args, script_args, training_args, model_args, reward_args):
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    dataset = load_data(script_args)
    eval_dataset = dataset.get(script_args.dataset_test_split)
    sys.path.insert(0, os.getcwd())  # where rewards of your own may lie

    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=[load_reward(name) for name in reward_args.reward_funcs],
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=eval_dataset if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=reft_args.peft_config(task_type="CAUSAL_LM"),
    )
    trainer.model.print_trainable_parameters()
    checkpoint = training_args.resume_from_checkpoint
    if str(checkpoint).lower() == "true":
        checkpoint = last_whole_checkpoint(training_args.output_dir)  # None if the run has not come that far
    trainer.train(resume_from_checkpoint=checkpoint)

    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Adapter saved to {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        if trainer.accelerator.is_main_process:
            trainer.model.push_to_hub(trainer.hub_model_id)  # adds to TRL's card how the adapter is loaded
        trainer.accelerator.print(f"Adapter pushed to https://huggingface.co/{trainer.hub_model_id}")


if __name__ == "__main__":
    parser = ReftParser((ScriptArguments, GRPOConfig, ModelConfig, RewardArguments))
    main(*parser.parse_args_and_config(fail_with_unknown_args=True))
