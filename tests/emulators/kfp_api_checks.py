"""What the server of `kfp_api` refuses; not the limits on names and sizes, nor what Argo would refuse later."""

from __future__ import annotations

import re
from typing import Any

from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

Json = dict[str, Any]


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def check_spec(document: Json) -> pipeline_spec_pb2.PipelineSpec:
    """The pipeline, if the server would take it: known fields only, and nothing refers to what is not there."""
    try:
        spec = json_format.ParseDict(document.get("pipeline_spec", document), pipeline_spec_pb2.PipelineSpec())
        json_format.ParseDict(document.get("platform_spec", {}), pipeline_spec_pb2.PlatformSpec())
    except json_format.ParseError as error:
        raise Refusal(400, f"Failed to parse the pipeline spec: {error}") from None
    if not re.fullmatch(r"2\.\d+\.\d+", spec.schema_version) or not spec.pipeline_info.name:
        raise Refusal(400, "pipeline spec is invalid: schemaVersion 2.x.x and pipelineInfo.name are needed")
    executors = dict(spec.deployment_spec["executors"].items())
    for label, component in spec.components.items():
        if component.WhichOneof("implementation") == "executor_label" and component.executor_label not in executors:
            raise Refusal(400, f"{label}: no executor {component.executor_label!r}")
    for component in (spec.root, *spec.components.values()):
        for name, task in component.dag.tasks.items():
            if task.component_ref.name not in spec.components:
                raise Refusal(400, f"{name}: no component {task.component_ref.name!r}")
            if lost := set(task.dependent_tasks) - set(component.dag.tasks):
                raise Refusal(400, f"{name}: waits for unknown tasks {sorted(lost)}")
    return spec


def check_arguments(spec: pipeline_spec_pb2.PipelineSpec, arguments: Json) -> None:
    """Refuse a missing or an unknown parameter, or a value of another type, in the server's words."""
    known = spec.root.input_definitions.parameters
    types = pipeline_spec_pb2.ParameterType.ParameterTypeEnum
    wanted = {types.STRING: str, types.NUMBER_INTEGER: int, types.BOOLEAN: bool, types.LIST: list, types.STRUCT: dict}
    for name, parameter in known.items():
        if name not in arguments and not parameter.HasField("default_value") and not parameter.is_optional:
            raise Refusal(400, f"parameter {name} is required but not found in the runtime config")
        if name in arguments and not isinstance(arguments[name], wanted.get(parameter.parameter_type, object)):
            raise Refusal(400, f"input parameter {name} is of another type")
    if unknown := set(arguments) - set(known):
        raise Refusal(400, f"runtime config has unknown parameters {sorted(unknown)}")
