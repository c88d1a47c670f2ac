"""What to say if the end of a prompt is not known."""

SKIPS_PREPARE = (
    "The model was called within `generate` with the call's own cache, but not with the result of "
    "`prepare_inputs_for_generation`. ReFT cannot tell which step this is. In code for custom_generate, call the "
    "model as transformers does: model(**model.prepare_inputs_for_generation(input_ids, **model_kwargs)). Or pass "
    "`prompt_lengths`, or use another cache."
)
USE_COLLATOR = "trainer.data_collator = peft_reft.DataCollatorWithPromptLengths(trainer.data_collator)"


def no_end(positions: str, is_decoder: bool) -> str:
    """Return the error for a training batch that does not provide the end of each prompt."""
    message = f"positions='{positions}' requires the end of each prompt, and this training batch does not provide it. "
    if is_decoder:
        return message + (
            "Pass `labels` to the encoder-decoder model's forward. Or pass `prompt_lengths`, a LongTensor [batch]: "
            "the number of tokens in `decoder_input_ids` before each answer, 1 for only the start token. Or "
            "choose 'f<n>' or 'all', or edit the encoder."
        )
    return message + (
        "Pass `labels` to the model's forward, with -100 on the prompt. Or pass `prompt_lengths`, a LongTensor "
        "[batch]: the number of tokens in each prompt, padding not counted. If a trainer keeps the labels for its own "
        f"loss (compute_loss_func, label smoothing), let the data collator add the lengths: {USE_COLLATOR}. In eval "
        "mode the complete input is the prompt."
    )


def labels_withheld(positions: str) -> str:
    """Return the error for ids that came with labels before and are given without them now."""
    return (
        "The input_ids came with labels, and the model is called without them. "
        f"positions='{positions}' requires the end of each prompt. Without labels, the answers would count as prompt. "
        "Read the logits of the call with labels, or pass `prompt_lengths` to both. If a trainer keeps the labels "
        "(label smoothing, compute_loss_func, compute_metrics), let the data collator add the lengths: "
        f"{USE_COLLATOR}."
    )


def whole_input(positions: str) -> str:
    """Return the warning for a call in eval mode whose complete input is taken as the prompt."""
    return (
        "The model was called in eval mode with several tokens, without labels and prompt_lengths. "
        f"positions='{positions}' takes the complete input as the prompt. That is wrong if the input contains an "
        "answer, for example to score it. Pass `prompt_lengths`, a LongTensor [batch]: the number of tokens in each "
        "prompt, padding not counted. Around code that you cannot change, write "
        "`with peft_reft.prompt_lengths(model, lengths):`. This warning appears once for each model."
    )
