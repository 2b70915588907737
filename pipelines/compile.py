"""Compiles the pipelines to the YAML that KFP runs: `python -m pipelines.compile [FOLDER]`."""

import itertools
import sys
from pathlib import Path

import yaml
from kfp import compiler

from ncsn.config import Config
from pipelines.cluster_fit import fit
from pipelines.sample_pipeline import sample_pipeline
from pipelines.train_pipeline import train_pipeline

COMPILED = Path(__file__).parent / "compiled"
PIPELINES = {"train_pipeline": train_pipeline, "sample_pipeline": sample_pipeline}


def compile_all(folder: Path = COMPILED, config: Config | None = None) -> list[Path]:
    """Write `<name>.yaml` of each pipeline into `folder`; the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    return [compile_one(name, folder, config) for name in PIPELINES]


def compile_one(name: str, folder: Path, config: Config | None = None) -> Path:
    """Write `<name>.yaml` of one of `PIPELINES` into `folder`; the path.

    `config` is the experiment that it will run, which decides how large its pods are; None if it is not known yet.
    """
    path = folder / f"{name}.yaml"
    compiler.Compiler().compile(PIPELINES[name], str(path))
    text = path.read_text()
    spec, *platforms = yaml.safe_load_all(text)
    fit(spec, platforms, config)
    heading = "".join(itertools.takewhile(lambda line: line.startswith("#"), text.splitlines(keepends=True)))
    path.write_text(heading + yaml.safe_dump_all([spec, *platforms], sort_keys=True))
    return path


if __name__ == "__main__":
    sys.stdout.writelines(f"{path}\n" for path in compile_all(Path(next(iter(sys.argv[1:]), COMPILED))))
