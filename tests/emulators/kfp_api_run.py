"""Executes one run of `kfp_api` in a process of its own; not in pods, so images, resources and secrets mean nothing."""

import json
import sys
from pathlib import Path

import yaml
from kfp import components, local


def main(folder: Path) -> None:
    """Execute `pipeline.json` with `arguments.json` in this environment."""
    document = json.loads((folder / "pipeline.json").read_text())
    arguments = json.loads((folder / "arguments.json").read_text())
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(folder / "artifacts"), enable_caching=False)
    components.load_component_from_text(yaml.safe_dump(document.get("pipeline_spec", document)))(**arguments)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
