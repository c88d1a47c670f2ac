"""What an installation of the package adds to site-packages apart from its code, in a folder for PYTHONPATH."""

import os
import shutil
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]


def install(folder: Path) -> None:
    """Write the metadata with the entry points, and the files that pyproject.toml puts beside the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for source, copy in project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"].items():
        shutil.copy(ROOT / source, folder / copy)
    metadata = folder / "peft_reft-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.4\nName: peft_reft\nVersion: 0.1.0\n")
    with (metadata / "entry_points.txt").open("w") as file:
        for group, points in project["project"]["entry-points"].items():
            file.writelines([f"[{group}]\n", *(f"{name} = {value}\n" for name, value in points.items())])


def environment(*path: Path, **variables: str) -> dict[str, str]:
    """The variables of a process that finds modules in `path`, and whose autoloading is as by default."""
    others = {k: v for k, v in os.environ.items() if k not in ("PEFT_REFT_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD")}
    return {**others, "PYTHONPATH": os.pathsep.join(map(str, path)), **variables}


# PEFT and transformers import these if they are installed, which is a third of what a new interpreter takes
WITHOUT = "import sys\nsys.modules.update(dict.fromkeys(['bitsandbytes', 'hqq', 'torchao']))\n"
