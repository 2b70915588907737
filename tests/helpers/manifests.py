"""What is in a manifest, and what the schemas of KubeRay's CRDs refuse, in each version at hand."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema

# Beside the checkout.
FOLDER = Path(os.environ.get("NCSN_CRD_SCHEMAS") or Path(__file__).parents[3] / "shared" / "crds")


def api_server_errors(manifest: dict[str, Any]) -> list[str]:
    """A line for each mistake in a resource, unknown fields too; none where no schema of its kind is at hand."""
    files = FOLDER.glob(f"{manifest['kind'].lower()}-v*.json")
    schemas = [json.loads(file.read_text(), object_hook=_strict) for file in files]
    errors = [error for schema in schemas for error in jsonschema.Draft202012Validator(schema).iter_errors(manifest)]
    return [f"{error.json_path}: {error.message}" for error in errors]


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """Without it, the API server drops what it does not know, and says nothing to a client that does not ask."""
    return {"additionalProperties": False, **schema} if isinstance(schema.get("properties"), dict) else schema


def within(node: Any, *keys: str) -> Iterator[tuple[str, Any]]:
    """(key, value) of these keys, wherever they are."""
    if isinstance(node, dict):
        yield from ((key, node[key]) for key in keys if key in node)
    for each in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from within(each, *keys)


def names_of(node: Any, key: str) -> set[str]:
    """Of the Secrets (`secret`) or ConfigMaps (`configMap`) that pods within refer to."""
    found = within(node, key, f"{key}Ref", f"{key}KeyRef")
    return {value.get("name", value.get("secretName")) for _, value in found if isinstance(value, dict)}
