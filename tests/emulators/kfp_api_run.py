"""Executes one run of `kfp_api` in a process of its own; not in pods, so images, resources and secrets mean nothing.

What the exit handler is told is what KFP 2.17.0's backend tells it: MLMD's COMPLETE for a success, never a message. A
task that fails is not tried again: the retryStrategy that KFP's manifests give to Argo 4.0.5 has the policy OnError.
"""

import json
import sys
from pathlib import Path

import yaml
from kfp import components, local
from kfp.local.orchestrator import orchestrator_utils

MLMD_STATES = {"SUCCEEDED": "COMPLETE"}


def main(folder: Path) -> None:
    """Execute `pipeline.json` with `arguments.json` in this environment."""
    document = json.loads((folder / "pipeline.json").read_text())
    arguments = json.loads((folder / "arguments.json").read_text())
    _speak_as_the_backend()
    spec = document.get("pipeline_spec", document)
    for component in (spec["root"], *spec["components"].values()):
        for task in component.get("dag", {}).get("tasks", {}).values():
            task.pop("retryPolicy", None)
    for executor in spec["deploymentSpec"]["executors"].values():
        executor.get("container", {}).pop("resources", None)
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(folder / "artifacts"), enable_caching=False)
    components.load_component_from_text(yaml.safe_dump(spec))(**arguments)


def _speak_as_the_backend() -> None:
    utils = orchestrator_utils.OrchestratorUtils
    resolve = utils.make_task_arguments.__func__

    def resolved(cls, task_inputs_spec, *args, **kwargs):
        found = resolve(cls, task_inputs_spec, *args, **kwargs)
        for name, spec in task_inputs_spec.parameters.items():
            if spec.HasField("task_final_status"):
                state = found[name]["state"]
                found[name] |= {"state": MLMD_STATES.get(state, state), "error": {}}
        return found

    utils.make_task_arguments = classmethod(resolved)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
