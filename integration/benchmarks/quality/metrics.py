"""Answers that are read off generated text, and metrics. Needs the standard library alone."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

HIGHER_IS_BETTER = {"accuracy": True, "matthews": True, "loss": False}


def extract_number(text: str) -> float:
    """The last number of a text, as LLM-Adapters and the paper read it; infinity if there is none."""
    numbers = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return float(numbers[-1]) if numbers else math.inf


def extract_letter(text: str) -> str:
    """The choice that a text names.

    LLM-Adapters and the paper take the first of the letters A to E, wherever it stands, which would be the A of the
    "A: ..." that is trained here. So the one after "answer is" comes first, and letters in words do not count.
    """
    letters = re.findall(r"answer is:? *\(?([A-E])\b", text) or re.findall(r"\b[A-E]\b", text)
    return letters[0] if letters else ""


def is_right(text: str, gold: str) -> bool:
    """Whether a text ends in the number, or names the letter, that is right."""
    if gold in list("ABCDE"):
        return extract_letter(text) == gold
    return abs(extract_number(text) - extract_number(gold)) <= 1e-3


def accuracy(predicted: Sequence[Any], gold: Sequence[Any]) -> float:
    return sum(p == g for p, g in zip(predicted, gold, strict=True)) / len(gold)


def matthews(predicted: Sequence[int], gold: Sequence[int]) -> float:
    """Matthews correlation of two classes; 0 where one side has a single class."""
    pairs = list(zip(predicted, gold, strict=True))
    tp, tn, fp, fn = (pairs.count(pair) for pair in ((1, 1), (0, 0), (1, 0), (0, 1)))
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(product) if product else 0.0


def summarize(
    scoring: str, outcome: dict[str, Any], gold: Sequence[Any], decode: Callable[[list[int]], str] | None = None
) -> dict[str, float]:
    """The metrics of what `train.evaluate` found.

    Args:
        scoring (`str`): as in protocol.py.
        outcome (`dict`): of samples.
        gold (`Sequence`): what is right for each of them.
        decode (`Callable`, *optional*): tokens to text, where they were generated.
    """
    summary = {"loss": outcome["loss"]} if "loss" in outcome else {}
    if scoring == "label":
        summary |= {"accuracy": accuracy(outcome["predicted"], gold), "matthews": matthews(outcome["predicted"], gold)}
    elif scoring == "choice":
        summary["accuracy"] = sum(outcome["exact"]) / len(gold)  # of greedy decoding, as the paper has it
        summary["choice_accuracy"] = accuracy(outcome["predicted"], gold)  # of the likeliest of the choices
    elif scoring == "number":
        assert decode is not None
        right = [is_right(decode(ids), answer) for ids, answer in zip(outcome["generated"], gold, strict=True)]
        summary["accuracy"] = sum(right) / len(gold)
    else:
        summary["perplexity"] = math.exp(min(outcome["loss"], 700))
    return summary
