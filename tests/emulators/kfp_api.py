"""The REST API of Kubeflow Pipelines v2beta1, without a cluster: no Argo, no caching, no artifacts in a browser, no
users but one token or cookie, no pages beyond the first, and only equality in filters.

It speaks HTTP to the real `kfp.Client`, checks a pipeline as the server does, and executes a run for real
with `kfp.local` in a process of its own. What it says of a run is what KFP 2.17.0 on Argo 4.0.5 says: its tasks are
Argo's nodes, without messages, and a run that somebody terminated has FAILED.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

Json = dict[str, Any]
ENDED = ("SUCCEEDED", "FAILED", "CANCELED")
_CRON_FIELDS = 6


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


class KfpServer:
    """The server and everything it knows. Start it with `with`.

    Attributes:
        token: If set, a request needs it as bearer token.
        cookie: If set, a request may have it in its place.
        login: Send a request without credentials to a login page instead of refusing it.
        multi_user: Experiments belong to a namespace.
        forbidden: Refuse whatever changes something with 403.
        idle: Leave every run pending.
        away: Answer 503, as a proxy does before a server that starts anew.
        behind_ui: Answer as ml-pipeline-ui does, through which a port-forward goes: it has another word for version.
        ready: With behind_ui, whether the API answers ml-pipeline-ui (2.17.0: its healthz is 200 without too).
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.token: str | None = None
        self.cookie: str | None = None
        self.login = False
        self.multi_user = False
        self.forbidden = False
        self.idle = False
        self.away = False
        self.behind_ui = False
        self.ready = True
        self.experiments: dict[str, Json] = {}
        self.runs: dict[str, Json] = {}
        self.recurring_runs: dict[str, Json] = {}
        self.requests: list[str] = []
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._threads: list[threading.Thread] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> KfpServer:
        self._threads.append(threading.Thread(target=self._server.serve_forever, args=(0.05,)))
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        for run_id in list(self._processes):
            self.terminate(run_id)
        self._server.shutdown()
        for thread in self._threads:
            thread.join()
        self._server.server_close()

    def create_run(self, body: Json) -> Json:
        """Check the pipeline and its arguments, and execute it in the background."""
        spec = body["pipeline_spec"]
        arguments = body.get("runtime_config", {}).get("parameters", {})
        check_arguments(check_spec(spec), arguments)
        self._check_experiment(body)
        run = {**body, "run_id": str(uuid.uuid4()), "state": "PENDING", "created_at": _now(), "pipeline_spec": spec}
        self.runs[run["run_id"]] = run
        if not self.idle:
            self._threads.append(threading.Thread(target=self._execute, args=(run, arguments)))
            self._threads[-1].start()
        return run

    def create_recurring_run(self, body: Json) -> Json:
        """Keep a schedule; it starts no runs."""
        check_arguments(check_spec(body["pipeline_spec"]), body.get("runtime_config", {}).get("parameters", {}))
        self._check_experiment(body)
        cron = body["trigger"].get("cron_schedule", {}).get("cron", "")
        if not cron.startswith("@") and len(cron.split()) != _CRON_FIELDS:
            raise Refusal(400, f"Expected exactly {_CRON_FIELDS} fields, found {len(cron.split())}: {cron}")
        if not 1 <= int(body.get("max_concurrency", 0)) <= 10:
            raise Refusal(400, "The max_concurrency of the recurring run must be between 1 and 10")
        recurring = {**body, "recurring_run_id": str(uuid.uuid4()), "status": "ENABLED", "created_at": _now()}
        self.recurring_runs[recurring["recurring_run_id"]] = recurring
        return recurring

    def terminate(self, run_id: str) -> Json:
        """End a run's processes."""
        process = self._processes.get(run_id)
        if process is not None and process.poll() is None:
            _known(self.runs, run_id)["state"] = "CANCELING"
            with suppress(ProcessLookupError):  # it ended by itself
                os.killpg(process.pid, signal.SIGKILL)
        return {}

    def _check_experiment(self, body: Json) -> None:
        _known(self.experiments, body.get("experiment_id", ""))
        if not body.get("display_name"):
            raise Refusal(400, "The display_name is empty. Please specify a valid name")

    def _execute(self, run: Json, arguments: Json) -> None:
        folder = self.root / run["run_id"]
        folder.mkdir(parents=True)
        (folder / "pipeline.json").write_text(json.dumps(run["pipeline_spec"]))
        (folder / "arguments.json").write_text(json.dumps(arguments))
        with (folder / "log.txt").open("wb") as log:
            command = [sys.executable, str(Path(__file__).with_name("kfp_api_run.py")), str(folder)]
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | {"NCSN_KFP_RUN_ID": run["run_id"]},  # in a cluster, a label of the pod
            )
        self._processes[run["run_id"]] = process
        run["state"] = "RUNNING"
        code = process.wait()
        text = re.sub(r"\x1b\[[0-9;]*m", "", (folder / "log.txt").read_text(errors="replace"))
        state = "FAILED" if code else "SUCCEEDED"
        spec = run["pipeline_spec"]
        run["run_details"] = {"task_details": _task_details(text, state, spec.get("pipeline_spec", spec))}
        run["finished_at"] = _now()
        run["state"] = state


def _task_details(log: str, state: str, spec: Json) -> list[Json]:
    """Argo's nodes, in no order: with the retryStrategy of KFP's manifests one for each task and one for each try.

    A task that was never begun is there once, without a state, and two nodes have not even a name.
    """
    ended = re.findall(r"Task '([\w-]+)' finished with status (\w+)", log)
    states = {name: "SUCCEEDED" if end == "SUCCESS" else "FAILED" for name, end in ended}
    nodes = {"ncsn-train-sd9mr": state, "root": state, "exit-handler-1": state, "exit-handler-1.onExit": "SUCCEEDED"}
    executors = []
    for name, reached in states.items():
        nodes |= {f"{name}-driver": "SUCCEEDED", name: reached}
        executors += [{"display_name": tried, "state": reached} for tried in ("executor", "executor(0)")]
    details = [{"display_name": tried, "state": end} for name, end in nodes.items() for tried in (name, f"{name}(0)")]
    components = (spec["root"], *spec["components"].values())
    tasks = {name for component in components for name in component.get("dag", {}).get("tasks", {})}
    never = [{"display_name": each} for name in tasks - nodes.keys() for each in (name, f"{name}-driver")]
    found = [*details, *executors, *never, {"execution_id": "1"}, {"execution_id": "2"}]
    return sorted(found, key=lambda each: sha256(json.dumps(each).encode()).digest())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _known(store: dict[str, Json], key: str) -> Json:
    if key not in store:
        raise Refusal(404, f"ResourceNotFoundError: {key} not found")
    return store[key]


def _listed(store: dict[str, Json], plural: str, query: dict[str, str]) -> Json:
    predicates = json.loads(query.get("filter") or "{}").get("predicates", [])
    equal = {each["key"]: each.get("stringValue", each.get("string_value")) for each in predicates}
    for key in ("namespace", "experiment_id"):
        if query.get(key):
            equal[key] = query[key]
    found = [item for item in store.values() if all(item.get(key) == value for key, value in equal.items())]
    return {plural: found, "total_size": len(found)} if found else {}


def _handler_of(server: KfpServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            content = self.rfile.read(length)
            server.requests.append(f"{self.command} {self.path}")
            try:
                self._require_credentials()
                status, body = 200, _route(server, self.command, self.path, content)
            except Refusal as refusal:
                status, body = refusal.status, {"code": 3, "message": str(refusal), "details": []}
            data = json.dumps(body).encode()
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "/dex/auth")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = _answer

        def _require_credentials(self) -> None:
            if server.away:
                raise Refusal(503, "upstream connect error")
            token, cookie = self.headers.get("Authorization"), self.headers.get("Cookie")
            asked = server.token or server.cookie
            shown = (server.token and token == f"Bearer {server.token}") or (server.cookie and cookie == server.cookie)
            if asked and not shown:
                raise Refusal(302 if server.login else 401, "Request header error: there is no user identity")
            if server.forbidden and self.command != "GET":
                raise Refusal(403, "User 'somebody' is not authorized with reason: Unauthorized access")

    return Handler


def _route(server: KfpServer, method: str, target: str, content: bytes) -> Json:
    parts = urlsplit(target)
    query = {key: values[0] for key, values in parse_qs(parts.query).items()}
    path = parts.path.removeprefix("/apis/v2beta1/")
    if path == "healthz":
        if not server.ready:
            return {"apiServerReady": False, "frontendTagName": "2.17.0-emulator"}
        version = "apiServerTagName" if server.behind_ui else "tag_name"
        return {"commit_sha": "0", version: "2.17.0-emulator", "multi_user": server.multi_user}
    kind, _, rest = path.partition("/")
    key, _, verb = rest.partition(":")
    stores = {"experiments": server.experiments, "runs": server.runs, "recurringruns": server.recurring_runs}
    if kind not in stores:
        raise Refusal(404, f"Not Found: {path}")
    if method == "GET":
        return _known(stores[kind], key) if key else _listed(stores[kind], kind, query)
    return _post(server, kind, key, verb, json.loads(content or b"{}"))


def _post(server: KfpServer, kind: str, key: str, verb: str, body: Json) -> Json:
    if (kind, verb) == ("runs", "terminate"):
        return server.terminate(key)
    creators: dict[str, Callable[[Json], Json]] = {
        "runs": server.create_run,
        "recurringruns": server.create_recurring_run,
        "experiments": lambda given: _create_experiment(server, given),
    }
    if kind not in creators or key:
        raise Refusal(501, f"not part of this emulator: POST {kind}/{key}:{verb}")
    return creators[kind](body)


def _create_experiment(server: KfpServer, body: Json) -> Json:
    if bool(body.get("namespace")) != server.multi_user:
        raise Refusal(400, "Invalid input error: a namespace is needed in multi-user mode, and only there")
    experiment = {**body, "experiment_id": str(uuid.uuid4()), "created_at": _now()}
    server.experiments[experiment["experiment_id"]] = experiment
    return experiment
