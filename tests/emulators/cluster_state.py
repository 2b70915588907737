"""What the emulated Kubernetes API server holds. Leaves out owners, and what its namespace does not need."""

from __future__ import annotations

import copy
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

Resource = dict[str, Any]


@dataclass
class Cluster:
    """Everything the API server holds, and how it misbehaves.

    Attributes:
        rules: RBAC rules of the caller.
        fields: Those of `spec` in the RayJob that is installed.
        installed: Whether there is a RayJob CRD at all.
        away: Drop every connection.
        cut_answers: How many answers to break off in the middle of their body.
        cut_logs: The same of logs.
        requests: (verb, resource) of every call.
        logs: Pod -> lines that its container has written, each with its time.
        last_words: Pod -> lines of its container before the last restart.
    """

    rules: list[Resource]
    fields: tuple[str, ...] = ("entrypoint", "preRunningDeadlineSeconds")
    installed: bool = True
    away: bool = False
    cut_answers: int = 0
    cut_logs: int = 0
    requests: list[tuple[str, str]] = field(default_factory=list)
    logs: dict[str, list[bytes]] = field(default_factory=dict)
    last_words: dict[str, list[str]] = field(default_factory=dict)
    on_create: Callable[[str], None] = lambda _name: None
    _objects: dict[tuple[str, str], Resource] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def get(self, plural: str, name: str) -> Resource | None:
        with self._lock:
            found = self._objects.get((plural, name))
            return copy.deepcopy(found) if found else None

    def list(self, plural: str, selector: str = "") -> list[Resource]:
        terms = [term for term in selector.split(",") if term]
        wanted = dict(term.split("=", 1) for term in terms if "=" in term)
        present = {term for term in terms if "=" not in term}
        with self._lock:
            found = [value for (kind, _), value in self._objects.items() if kind == plural]
            labeled = [(o, o["metadata"].get("labels", {})) for o in found]
            return [copy.deepcopy(o) for o, has in labeled if wanted.items() <= has.items() and present <= has.keys()]

    def create(self, plural: str, resource: Resource) -> Resource:
        with self._lock:
            name = resource["metadata"]["name"]
            if (plural, name) in self._objects:
                raise Refusal(409, "AlreadyExists", f'{plural}.ray.io "{name}" already exists')
            resource["metadata"] |= {
                "uid": str(uuid.uuid4()),
                "creationTimestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
            return self._store(plural, resource)

    def update(self, plural: str, name: str, change: Callable[[Resource], None]) -> Resource:
        """Change it in place; gone if it is being deleted and has no finalizer left."""
        with self._lock:
            resource = self.get(plural, name)
            if resource is None:
                raise Refusal(404, "NotFound", f'{plural} "{name}" not found')
            change(resource)
            metadata = resource["metadata"]
            if "deletionTimestamp" in metadata and not metadata.get("finalizers"):
                del self._objects[plural, name]
                return resource
            return self._store(plural, resource)

    def delete(self, plural: str, name: str) -> Resource:
        stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return self.update(plural, name, lambda resource: resource["metadata"].setdefault("deletionTimestamp", stamp))

    def allows(self, verb: str, group: str, resource: str) -> bool:
        return any(
            verb in rule["verbs"] and group in rule["apiGroups"] and resource in rule["resources"]
            for rule in self.rules
        )

    def _store(self, plural: str, resource: Resource) -> Resource:
        self._objects[plural, resource["metadata"]["name"]] = resource
        return copy.deepcopy(resource)


class Refusal(Exception):
    """An answer other than 2xx."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = {"kind": "Status", "code": code, "reason": reason, "message": message, "status": "Failure"}


def rules_of(path: Path) -> list[Resource]:
    """The rules of a Role in a file."""
    rules: list[Resource] = yaml.safe_load(path.read_text())["rules"]
    return rules


def pairs(rules: list[Resource]) -> Iterator[tuple[str, str]]:
    """(verb, resource) that the rules grant."""
    for rule in rules:
        yield from ((verb, resource) for resource in rule["resources"] for verb in rule["verbs"])
