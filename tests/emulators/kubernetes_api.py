"""Kubernetes API over real HTTP. Leaves out TLS, tokens, webhooks, pagination and all but RayJobs, ConfigMaps, Secrets,
service accounts, pods, logs, events and Argo's Workflows.

Reads and writes behave as the real server's do for one namespace: 409 for a name that exists, RBAC with the words of a
real refusal. The switches of `Cluster` make it fail as real ones do.
"""

from __future__ import annotations

import copy
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Resource = dict[str, Any]

NAMESPACE = "kubeflow"
_VERBS = {"GET": "get", "POST": "create", "PATCH": "patch", "DELETE": "delete"}


@dataclass
class Cluster:
    """Everything the API server holds, and how it misbehaves."""

    rules: list[Resource]  # RBAC rules of the caller
    # Of `spec` in the RayJob that is installed; None without its CRD.
    fields: tuple[str, ...] | None = ("entrypoint", "preRunningDeadlineSeconds")
    away: bool = False  # drop every connection
    cut_answers: int = 0  # how many answers to break off in the middle of their body
    requests: list[tuple[str, str]] = field(default_factory=list)  # (verb, resource) of every call
    logs: dict[str, list[bytes]] = field(default_factory=dict)  # pod -> lines that its container wrote, with times
    on_create: Callable[[str], None] = lambda _name: None
    _objects: dict[tuple[str, str], Resource] = field(default_factory=dict)
    _changes: list[tuple[str, str, Resource]] = field(default_factory=list)  # event, kind, object
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def get(self, plural: str, name: str) -> Resource | None:
        with self._lock:
            found = self._objects.get((plural, name))
            return copy.deepcopy(found) if found else None

    def list(self, plural: str, selector: str = "") -> list[Resource]:
        wanted = [term.partition("=") for term in selector.split(",") if term]  # a label alone may have any value

        def has(labels: dict[str, str]) -> bool:
            return all(key in labels and (not equal or labels[key] == value) for key, equal, value in wanted)

        with self._lock:
            found = [each for (kind, _), each in self._objects.items() if kind == plural]
            return [copy.deepcopy(each) for each in found if has(each["metadata"].get("labels", {}))]

    def create(self, plural: str, resource: Resource) -> Resource:
        with self._lock:
            name = resource["metadata"]["name"]
            if (plural, name) in self._objects:
                raise Refusal(409, "AlreadyExists", f'{plural}.ray.io "{name}" already exists')
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            resource["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": now}
            return self._store(plural, resource)

    def update(self, plural: str, name: str, change: Callable[[Resource], None]) -> Resource:
        """Change it in place."""
        with self._lock:
            resource = self.known(plural, name)
            change(resource)
            return self._store(plural, resource)

    def delete(self, plural: str, name: str, uid: str | None = None) -> Resource:
        with self._lock:
            resource = self.known(plural, name)
            if uid not in (None, resource["metadata"]["uid"]):
                raise Refusal(409, "Conflict", f"the UID in the precondition ({uid}) is not that of the object")
            del self._objects[plural, name]
            self._note("DELETED", plural, resource)
            return resource

    def known(self, plural: str, name: str) -> Resource:
        found = self.get(plural, name)
        if found is None:
            raise Refusal(404, "NotFound", f'{plural} "{name}" not found')
        return found

    def allows(self, verb: str, group: str, resource: str, name: str) -> bool:
        return any(
            verb in rule["verbs"]
            and group in rule["apiGroups"]
            and resource in rule["resources"]
            and name in rule.get("resourceNames", [name])
            for rule in self.rules
        )

    def _store(self, plural: str, resource: Resource) -> Resource:
        self._objects[plural, resource["metadata"]["name"]] = resource
        self._note("MODIFIED", plural, resource)
        return copy.deepcopy(resource)

    def _note(self, event: str, plural: str, resource: Resource) -> None:
        resource["metadata"]["resourceVersion"] = str(len(self._changes))
        self._changes.append((event, plural, copy.deepcopy(resource)))

    def watch(self, plural: str, name: str) -> Iterator[tuple[str, Resource] | None]:
        """The events of one object, of which the first says what it is now; None while there is no other."""
        with self._lock:
            found, seen = self.get(plural, name), len(self._changes)
        if found is not None:
            yield "ADDED", found
        while True:
            for event, kind, resource in self._changes[seen:]:
                seen += 1
                if (kind, resource["metadata"]["name"]) == (plural, name):
                    yield event, resource
            yield None


class Refusal(Exception):
    """An answer other than 2xx."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = {"kind": "Status", "code": code, "reason": reason, "message": message, "status": "Failure"}


def pairs(rules: list[Resource]) -> Iterator[tuple[str, str]]:
    """(verb, resource) that the rules grant."""
    for rule in rules:
        yield from ((verb, resource) for resource in rule["resources"] for verb in rule["verbs"])


def _merge(resource: Resource, change: Resource) -> None:
    """RFC 7386."""
    for key, value in change.items():
        if value is None:
            resource.pop(key, None)
        elif isinstance(value, dict):
            _merge(resource.setdefault(key, {}), value)
        else:
            resource[key] = value


@contextmanager
def served(cluster: Cluster) -> Iterator[Resource]:
    """Serve a `Cluster` on loopback; its kubeconfig."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"cluster": cluster}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    context = {"cluster": "emulated", "user": "nobody", "namespace": NAMESPACE}
    yield {
        "current-context": "emulated",
        "clusters": [{"name": "emulated", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "nobody", "user": {}}],
        "contexts": [{"name": "emulated", "context": context}],
    }
    server.shutdown()
    server.server_close()


class _Handler(BaseHTTPRequestHandler):
    cluster: Cluster
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        if self.cluster.away:
            self.close_connection = True
            return
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"null")
        split = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(split.query).items()}
        try:
            self._route(_VERBS[self.command], split.path.strip("/").split("/"), query, body)
        except Refusal as refusal:
            self._send(refusal.status, refusal.status["code"])

    do_GET = do_POST = do_PATCH = do_DELETE = _answer

    def _route(self, verb: str, path: list[str], query: dict[str, str], body: Any) -> None:
        match path:
            case ["openapi", "v3", "apis", "ray.io", "v1"]:
                self._send_schema()
            case ["apis", "authorization.k8s.io", "v1", "selfsubjectaccessreviews"]:
                asked = body["spec"]["resourceAttributes"]
                resource = "/".join(part for part in (asked["resource"], asked.get("subresource")) if part)
                allowed = self.cluster.allows(asked["verb"], asked.get("group", ""), resource, asked.get("name", ""))
                self._send(body | {"status": {"allowed": allowed}}, 201)
            case ["api", "v1", "namespaces", _, "pods", name, "log"]:
                self._authorize(verb, "", "pods/log")
                self._send_log(name, query)
            case ["api", "v1", "namespaces", _, plural, *name]:
                self._serve(verb, "", plural, name, query, body)
            case ["apis", "ray.io" | "argoproj.io" as group, _, "namespaces", _, plural, *name]:
                self._serve(verb, group, plural, name, query, body)
            case _:
                raise Refusal(404, "NotFound", f"the emulator has no {self.path}")

    def _serve(self, verb: str, group: str, plural: str, name: list[str], query: dict[str, str], body: Any) -> None:
        if verb == "get" and not name:
            verb = "watch" if "watch" in query else "list"
        self._authorize(verb, group, plural, *name)
        match verb:
            case "watch":
                self._send_changes(plural, query)
            case "list":
                about = query.get("fieldSelector", "").removeprefix("involvedObject.name=")
                found = self.cluster.list(plural, query.get("labelSelector", ""))
                items = [each for each in found if not about or each["involvedObject"]["name"] == about]
                self._send({"metadata": {}, "items": items})
            case "create":
                created = self.cluster.create(plural, body)
                if plural == "rayjobs":
                    self.cluster.on_create(body["metadata"]["name"])
                self._send(created, 201)
            case "patch":
                self._send(self.cluster.update(plural, name[0], lambda resource: _merge(resource, body)))
            case "delete":
                self._send(self.cluster.delete(plural, name[0], (body.get("preconditions") or {}).get("uid")))
            case _:
                self._send(self.cluster.known(plural, name[0]))

    def _authorize(self, verb: str, group: str, resource: str, name: str = "") -> None:
        self.cluster.requests.append((verb, resource))
        if not self.cluster.allows(verb, group, resource, name):
            full, user = f"{resource}.{group}".rstrip("."), f"system:serviceaccount:{NAMESPACE}:pipeline-runner"
            cannot = f'User "{user}" cannot {verb} resource "{resource}" in API group "{group}"'
            raise Refusal(403, "Forbidden", f'{full} is forbidden: {cannot} in the namespace "{NAMESPACE}"')

    def _send_changes(self, plural: str, query: dict[str, str]) -> None:
        """A watch, which ends after its time."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        ends, self.close_connection = time.monotonic() + float(query["timeoutSeconds"]), True
        with suppress(OSError):  # who has seen enough goes away
            for change in self.cluster.watch(plural, query["fieldSelector"].removeprefix("metadata.name=")):
                if self.cluster.away:
                    return
                if change is not None:
                    line = json.dumps({"type": change[0], "object": change[1]}).encode() + b"\n"
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                elif time.monotonic() > ends:
                    break
                time.sleep(0.02)
            self.wfile.write(b"0\r\n\r\n")

    def _send_schema(self) -> None:
        if self.cluster.fields is None:
            raise Refusal(404, "NotFound", "the server could not find the requested resource")
        schema = {"properties": {"spec": {"properties": {name: {} for name in self.cluster.fields}}}}
        kind = {"group": "ray.io", "version": "v1", "kind": "RayJob"}
        schemas = {"io.ray.v1.RayJob": schema | {"x-kubernetes-group-version-kind": [kind]}}
        self._send({"openapi": "3.0.0", "components": {"schemas": schemas}})

    def _send_log(self, pod: str, query: dict[str, str]) -> None:
        if pod not in self.cluster.logs:
            raise Refusal(400, "BadRequest", f'container "ray-job-submitter" in pod "{pod}" is waiting to start')
        since = query.get("sinceTime", "")[: len("2026-01-01T00:00:00")].encode()
        lines = [line for line in self.cluster.logs[pod] if line >= since][-int(query.get("tailLines", 0)) :]
        if "timestamps" not in query:
            lines = [line.partition(b" ")[2] for line in lines]
        self._send_content(b"".join(lines), "text/plain")

    def _send(self, document: Any, code: int = 200) -> None:
        self._send_content(json.dumps(document).encode(), "application/json", code)

    def _send_content(self, content: bytes, kind: str, code: int = 200) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.cluster.cut_answers > 0:
            self.cluster.cut_answers -= 1
            content, self.close_connection = content[: len(content) // 2], True
        self.wfile.write(content)
