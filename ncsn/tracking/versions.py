"""Registered models, their versions and aliases, as `models:/` addresses name them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from ncsn.config.schema import MODEL_NAME_PATTERN
from ncsn.errors import UserError
from ncsn.tracking.client import insert_or_find, mlflow_errors, one_line

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

CHAMPION = "champion"
CHALLENGER = "challenger"
SCHEME = "models:/"
_MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")

registry_errors = partial(mlflow_errors, prefix="the registry refuses: ")


@contextmanager
def named(address: str) -> Iterator[None]:
    """Name this address where the registry has no such model, version or alias."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code in _MISSING:
            raise UserError(address, one_line(error)) from None
        raise


def is_model_address(text: str) -> bool:
    """Whether a text is `models:/NAME/VERSION`, `models:/NAME@ALIAS` or one of these without the scheme."""
    return text.startswith(SCHEME) or re.fullmatch(rf"{MODEL_NAME_PATTERN}(/\d+|@[^/@:]+)", text) is not None


def resolve_version(client: MlflowClient, address: str) -> ModelVersion:
    """The version that an address names: `models:/NAME/VERSION`, `models:/NAME@ALIAS`, or without the scheme."""
    match = re.fullmatch(r"(?P<name>[^/@]+)(?:/(?P<version>[^/@]+)|@(?P<alias>[^/@]+))", address.removeprefix(SCHEME))
    if match is None:
        raise UserError(address, "not a model version", hint=f"use {SCHEME}NAME@{CHAMPION} or {SCHEME}NAME/VERSION")
    name, version, alias = match["name"], match["version"], match["alias"]
    with named(f"{SCHEME}{match[0]}"):
        return client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)


def aliased_version(client: MlflowClient, name: str, alias: str) -> str:
    """The version that an alias points to; empty if there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_model_version_by_alias(name, alias).version)
    except MlflowException as error:
        if error.error_code not in _MISSING:
            raise
    return ""


def set_alias(client: MlflowClient, *, name: str, alias: str, version: str) -> None:
    insert_or_find(lambda: client.set_registered_model_alias(name, alias, version))


def tag_version(client: MlflowClient, name: str, version: str, tags: Mapping[str, str]) -> None:
    """Set tags in order."""
    for key, value in tags.items():
        insert_or_find(partial(client.set_model_version_tag, name, version, key, value))
