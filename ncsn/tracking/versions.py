"""Registered models, their versions and aliases, as `models:/` addresses name them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from ncsn.config.schema import MODEL_NAME_PATTERN
from ncsn.errors import UserError
from ncsn.tracking.client import insert_or_find, mlflow_errors

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

CHAMPION = "champion"
CHALLENGER = "challenger"
SCHEME = "models:/"
_NAMES_SHOWN = 5

registry_errors = partial(mlflow_errors, prefix="the registry refuses: ")


def require_model_name(name: str) -> None:
    """Refuse a name that cannot be part of a `models:/name@alias` address."""
    if not re.fullmatch(MODEL_NAME_PATTERN, name):
        raise UserError(
            f"{SCHEME}{name}",
            "not a valid name of a registered model",
            hint="use letters, digits, '.', '-' and '_', no spaces, '/' or ':'",
        )


def is_model_address(text: str) -> bool:
    """Whether a text is `models:/NAME/VERSION`, `models:/NAME@ALIAS` or one of these without the scheme."""
    return text.startswith(SCHEME) or re.fullmatch(rf"{MODEL_NAME_PATTERN}(/\d+|@[^/@:]+)", text) is not None


def resolve_version(client: MlflowClient, address: str) -> ModelVersion:
    """The version that an address names: `models:/NAME/VERSION`, `models:/NAME@ALIAS`, or without the scheme."""
    match = re.fullmatch(r"(?P<name>[^/@]+)(?:/(?P<version>[^/@]+)|@(?P<alias>[^/@]+))", address.removeprefix(SCHEME))
    if match is None:
        raise UserError(address, "not a model version", hint=f"use {SCHEME}NAME@{CHAMPION} or {SCHEME}NAME/VERSION")
    name, version, alias = match["name"], match["version"], match["alias"]
    require_model(client, name)
    if version is not None:
        return require_version(client, name, version)
    _require_alias(name, alias)
    found = aliased_version(client, name, alias)
    if found is None:
        (model,) = client.search_registered_models(f"name = '{name}'")
        aliases = ", ".join(sorted(model.aliases)) or "none"
        raise UserError(f"{SCHEME}{name}@{alias}", f"no such alias; the model has: {aliases}")
    return found


def require_model(client: MlflowClient, name: str) -> None:
    """Refuse a model that is not in the registry, and list those that are."""
    require_model_name(name)
    if not client.search_registered_models(f"name = '{name}'"):
        models = [model.name for model in client.search_registered_models()]
        listed = ", ".join(models[:_NAMES_SHOWN]) or "none"
        raise UserError(f"{SCHEME}{name}", f"no such model; the registry has: {listed}")


def require_version(client: MlflowClient, name: str, version: str) -> ModelVersion:
    """A version of a model; an unknown one is refused with the latest there are."""
    versions = {str(found.version): found for found in client.search_model_versions(f"name = '{name}'")}
    if version not in versions:
        listed = ", ".join(sorted(versions, key=int)[-_NAMES_SHOWN:]) or "none"
        raise UserError(f"{SCHEME}{name}/{version}", f"no such version; the latest are: {listed}")
    return client.get_model_version(name, version)


def has_version(client: MlflowClient, name: str, version: str) -> bool:
    """Whether the registry has this version."""
    return bool(client.search_model_versions(f"name = '{name}' and version_number = {int(version)}"))


def aliased_version(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """The version that an alias points to, or None."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
    return None


def aliases_of(client: MlflowClient, name: str, version: str) -> list[str]:
    """Aliases of a version, sorted."""
    return sorted(client.get_model_version(name, version).aliases)


def set_alias(client: MlflowClient, *, name: str, alias: str, version: str) -> None:
    """Point an alias at a version."""
    _require_alias(name, alias)
    insert_or_find(lambda: client.set_registered_model_alias(name, alias, version))


def tag_version(client: MlflowClient, name: str, version: str, tags: Mapping[str, str]) -> None:
    """Set tags in order."""
    for key, value in tags.items():
        insert_or_find(partial(client.set_model_version_tag, name, version, key, value))


def ensure_model(client: MlflowClient, name: str, *, description: str) -> None:
    """Create a registered model unless there is one."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description=description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _require_alias(name: str, alias: str) -> None:
    address = f"{SCHEME}{name}@{alias}"
    if alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias):
        raise UserError(
            address, "MLflow reserves this alias for version numbers", hint=f"choose a word such as {CHAMPION!r}"
        )
    if not re.fullmatch(r"[a-z][a-z0-9_-]{0,254}", alias):
        raise UserError(address, "not a valid alias", hint="use lower-case letters, digits, '-' and '_'")
