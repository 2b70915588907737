"""A compiled pipeline with its arguments, checked before anything is sent."""

from __future__ import annotations

import contextlib
import difflib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ncsn.config import Config
from ncsn.errors import UserError
from pipelines.compile import PIPELINES, compile_one

_TYPES: Mapping[str, tuple[type, ...]] = {
    "NUMBER_INTEGER": (int,),
    "NUMBER_DOUBLE": (int, float),
    "BOOLEAN": (bool,),
    "LIST": (list,),
    "STRUCT": (dict,),
}


@contextlib.contextmanager
def package(
    pipeline: str,
    given: Mapping[str, Any],
    *,
    cache: bool = True,
    known: Sequence[str] = (),
    config: Config | None = None,
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The compiled pipeline in a file that goes when the block ends, and the checked arguments.

    Args:
        pipeline: `train`, or another of `PIPELINES` without its ending.
        given: Arguments, see `arguments_for`.
        cache: False keeps every task out of KFP's cache.
        known: Tasks that may be cached in addition, because the arguments tell all that they depend on.
        config: The experiment that it will run; None if that is not known.

    Raises:
        UserError: for an unknown pipeline, or arguments that do not fit.
    """
    name = f"{pipeline}_pipeline"
    if name not in PIPELINES:
        choices = ", ".join(known.removesuffix("_pipeline") for known in PIPELINES)
        raise UserError("--pipeline", "no such pipeline", hint=f"choose one of {choices}", value=pipeline)
    with tempfile.TemporaryDirectory(prefix="ncsn-") as folder:
        path = compile_one(name, Path(folder), config)
        spec, *platforms = yaml.safe_load_all(path.read_text())
        arguments = arguments_for(spec, given)
        _set_caching(spec, cache=cache, known=known)
        path.write_text(yaml.safe_dump_all([spec, *platforms], sort_keys=True))
        yield path, arguments


def arguments_for(spec: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as the pipeline's parameters want them.

    Args:
        spec: The compiled pipeline.
        given: Name -> value; text is read as YAML for a parameter that is no text.

    Raises:
        UserError: for a name that the pipeline does not know, one that it needs, or a value of another type.
    """
    known = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            meant = f"did you mean {close[0]!r}? " if close else ""
            hint = f"{meant}the pipeline takes: {', '.join(sorted(known))}"
            raise UserError("--param", "unknown parameter", hint=hint, value=name)
    missing = [
        name
        for name, parameter in known.items()
        if name not in given and "defaultValue" not in parameter and not parameter.get("isOptional")
    ]
    if missing:
        name = missing[0]
        description = known[name].get("description", "")
        raise UserError("--param", f"the pipeline needs {name}", hint=f"pass --param {name}=VALUE: {description}")
    return {name: _typed(name, value, known[name]["parameterType"]) for name, value in given.items()}


def _typed(name: str, value: Any, wanted: str) -> Any:
    if wanted == "STRING":
        return str(value)
    try:
        parsed = yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        parsed = None
    is_flag = isinstance(parsed, bool) and wanted != "BOOLEAN"
    if is_flag or not isinstance(parsed, _TYPES[wanted]):
        raise UserError("--param", f"expected a {wanted.lower().replace('_', ' ')}", value=f"{name}={value}")
    return parsed


def _set_caching(spec: dict[str, Any], *, cache: bool, known: Sequence[str]) -> None:
    """Change the tasks of all graphs; KFP's client would miss those inside an exit handler."""
    for component in (spec["root"], *spec["components"].values()):
        for name, task in component.get("dag", {}).get("tasks", {}).items():
            if not cache:
                task["cachingOptions"] = {}
            elif name in known:
                task["cachingOptions"] = {"enableCache": True}
