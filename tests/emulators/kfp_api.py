"""The REST API of Kubeflow Pipelines v2beta1, without a cluster. It keeps what it gets and executes nothing.

It speaks HTTP to the real `kfp.Client`, and knows the fields of a pipeline. A test says what becomes of a run.
No users but one token or cookie, and lists are empty: the client makes an experiment for each run.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

Json = dict[str, Any]


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def check_spec(document: Json) -> None:
    """Refuse a pipeline with a field that the server does not know."""
    try:
        json_format.ParseDict(document.get("pipeline_spec", document), pipeline_spec_pb2.PipelineSpec())
        json_format.ParseDict(document.get("platform_spec", {}), pipeline_spec_pb2.PlatformSpec())
    except json_format.ParseError as error:
        raise Refusal(400, f"Failed to parse the pipeline spec: {error}") from None


class KfpServer:
    """The server and everything it knows. Start it with `with`.

    Attributes:
        token: If set, a request needs it as bearer token.
        cookie: If set, a request may have it in its place.
        login: Send a request without credentials to a login page instead of refusing it.
        multi_user: Experiments belong to a namespace.
        forbidden: Refuse whatever changes something with 403.
        away: Answer 503, as a proxy does before a server that starts anew.
        behind_ui: Answer as ml-pipeline-ui does, through which a port-forward goes: it has another word for version.
        ready: With behind_ui, whether the API answers ml-pipeline-ui (2.17.0: its healthz is 200 without too).
    """

    def __init__(self) -> None:
        self.token: str | None = None
        self.cookie: str | None = None
        self.login = False
        self.multi_user = False
        self.forbidden = False
        self.away = False
        self.behind_ui = False
        self.ready = True
        self.experiments: dict[str, Json] = {}
        self.runs: dict[str, Json] = {}
        self.recurring_runs: dict[str, Json] = {}
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> KfpServer:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def create_experiment(self, body: Json) -> Json:
        if bool(body.get("namespace")) != self.multi_user:
            raise Refusal(400, "Invalid input error: a namespace is needed in multi-user mode, and only there")
        return _keep(self.experiments, body, "experiment_id")

    def create_run(self, body: Json) -> Json:
        """It stays pending."""
        self._check(body)
        return _keep(self.runs, body | {"state": "PENDING"}, "run_id")

    def create_recurring_run(self, body: Json) -> Json:
        """A schedule. It starts no runs."""
        self._check(body)
        return _keep(self.recurring_runs, body | {"status": "ENABLED"}, "recurring_run_id")

    def _check(self, body: Json) -> None:
        check_spec(body["pipeline_spec"])
        _known(self.experiments, body.get("experiment_id", ""))


def _keep(store: dict[str, Json], body: Json, identifier: str) -> Json:
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    kept = body | {identifier: str(uuid.uuid4()), "created_at": now}
    store[kept[identifier]] = kept
    return kept


def _known(store: dict[str, Json], key: str) -> Json:
    if key not in store:
        raise Refusal(404, f"ResourceNotFoundError: {key} not found")
    return store[key]


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
    path = urlsplit(target).path.removeprefix("/apis/v2beta1/")
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
        return _known(stores[kind], key) if key else {}
    if verb == "terminate":
        return {}  # a run takes its time to end
    creators: dict[str, Callable[[Json], Json]] = {
        "experiments": server.create_experiment,
        "runs": server.create_run,
        "recurringruns": server.create_recurring_run,
    }
    return creators[kind](json.loads(content))
