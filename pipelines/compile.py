"""Compiles the pipelines to the YAML that KFP runs: `ncsn compile`, or `python -m pipelines.compile [FOLDER]`."""

import sys
from pathlib import Path

from kfp import compiler

from pipelines.sample_pipeline import sample_pipeline
from pipelines.search_pipeline import search_pipeline
from pipelines.train_pipeline import train_pipeline

COMPILED = Path(__file__).parent / "compiled"
PIPELINES = {
    "train_pipeline": train_pipeline,
    "search_pipeline": search_pipeline,
    "sample_pipeline": sample_pipeline,
}


def compile_all(folder: Path = COMPILED) -> list[Path]:
    """Write `<name>.yaml` of each pipeline into `folder`; the paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    return [compile_one(name, folder) for name in PIPELINES]


def compile_one(name: str, folder: Path) -> Path:
    """Write `<name>.yaml` of one pipeline into `folder`; the path."""
    path = folder / f"{name}.yaml"
    compiler.Compiler().compile(PIPELINES[name], str(path))
    return path


if __name__ == "__main__":
    sys.stdout.writelines(f"{path}\n" for path in compile_all(*map(Path, sys.argv[1:2])))
