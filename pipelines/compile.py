"""Compiles the pipelines to the YAML that KFP runs: `python -m pipelines.compile [FOLDER]`."""

import sys
from pathlib import Path

from kfp import compiler

from pipelines.train_pipeline import train_pipeline

COMPILED = Path(__file__).parent / "compiled"
PIPELINES = {"train_pipeline": train_pipeline}


def compile_all(folder: Path = COMPILED) -> list[Path]:
    """Write `<name>.yaml` of each pipeline into `folder`; the paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, pipeline in PIPELINES.items():
        paths.append(folder / f"{name}.yaml")
        compiler.Compiler().compile(pipeline, str(paths[-1]))
    return paths


if __name__ == "__main__":
    sys.stdout.writelines(f"{path}\n" for path in compile_all(*map(Path, sys.argv[1:2])))
