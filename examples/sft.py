"""Supervised fine-tuning with ReFT: TRL's own scripts/sft.py, with ReFT in place of LoRA.

Any causal LM and data set, from the Hub or from disk:

    python examples/sft.py \\
        --model_name_or_path Qwen/Qwen3-0.6B \\
        --dataset_name trl-lib/Capybara \\
        --reft_r 8 --reft_positions f7+l7 \\
        --num_train_epochs 1 --per_device_train_batch_size 8 \\
        --eval_strategy steps --eval_steps 100 \\
        --output_dir Qwen3-0.6B-ReFT --push_to_hub

The base model in 4 bits, and a local file (.json, .jsonl, .csv or .parquet):

    python examples/sft.py \\
        --model_name_or_path meta-llama/Llama-3.2-1B --load_in_4bit --dtype bfloat16 \\
        --dataset_name examples/demo/instructions.jsonl \\
        --reft_r 4 --reft_positions f5+l5 --reft_share_weights --reft_layers_to_transform 3 6 9 12 \\
        --max_steps 40 --output_dir Llama-3.2-1B-captain

An interrupted run goes on from its last whole checkpoint with `--resume_from_checkpoint true` added to its command (or
from the beginning if it has none), and from another one with the path of that.

The data must say where each prompt ends: prompt-completion pairs, or conversations with `--assistant_only_loss`.
"""

from pathlib import Path

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, get_quantization_config

from peft_reft import last_whole_checkpoint
from peft_reft.arguments import ReftParser

FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_data(script_args):
    if script_args.dataset_name is None:
        raise ValueError("Name the data with --dataset_name: a Hub id, a folder, or a file.")
    if Path(script_args.dataset_name).is_file():
        builder = FILE_TYPES[Path(script_args.dataset_name).suffix]
        return load_dataset(builder, data_files=script_args.dataset_name, streaming=script_args.dataset_streaming)
    return load_dataset(
        script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
    )


def main(reft_args, script_args, training_args, model_args):
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    dataset = load_data(script_args)
    eval_dataset = dataset.get(script_args.dataset_test_split)

    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=reft_args.peft_config(task_type="CAUSAL_LM"),
    )
    trainer.model.print_trainable_parameters()
    checkpoint = training_args.resume_from_checkpoint
    if str(checkpoint).lower() == "true":
        checkpoint = last_whole_checkpoint(training_args.output_dir)  # None if the run has not come that far
    trainer.train(resume_from_checkpoint=checkpoint)
    if eval_dataset is not None:
        trainer.log_metrics("eval", trainer.evaluate())

    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Adapter saved to {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        if trainer.accelerator.is_main_process and not trainer.is_fsdp_enabled:  # one alone has not all shards
            trainer.model.push_to_hub(trainer.hub_model_id)  # adds to TRL's card how the adapter is loaded
        trainer.accelerator.print(f"Adapter pushed to https://huggingface.co/{trainer.hub_model_id}")


if __name__ == "__main__":
    parser = ReftParser((ScriptArguments, SFTConfig, ModelConfig))
    main(*parser.parse_args_and_config(fail_with_unknown_args=True))
