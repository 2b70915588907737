"""The REST API of Kubeflow Pipelines v2beta1, without a cluster. It keeps what it gets and executes nothing.

It speaks HTTP to the real `kfp.Client`, and knows the fields of a pipeline. A test says what becomes of a run.
No users but one token or cookie, and lists are empty: the client makes an experiment for each run.
"""

from __future__ import annotations

import json
import threading
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

Json = dict[str, Any]

# The name of the identifier, and what is added.
_CREATED: dict[str, tuple[str, Json]] = {
    "experiments": ("experiment_id", {}),
    "runs": ("run_id", {"state": "PENDING"}),
    "recurringruns": ("recurring_run_id", {"status": "ENABLED"}),
}


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


@dataclass
class KfpServer:
    """The server and everything it knows. Start it with `with`."""

    token: str | None = None  # if set, a request needs it as bearer token
    cookie: str | None = None  # if set, a request may have it in the token's place
    login: bool = False  # send a request without credentials to a login page instead of refusing it
    multi_user: bool = False  # experiments belong to a namespace
    forbidden: bool = False  # refuse whatever changes something with 403
    away: bool = False  # answer 503, as a proxy does before a server that starts anew
    # Answer as ml-pipeline-ui does, through which a port-forward goes: it has another word for version.
    behind_ui: bool = False
    ready: bool = True  # whether the API answers ml-pipeline-ui, whose healthz is 200 without too (2.17.0)
    experiments: dict[str, Json] = field(default_factory=dict)
    runs: dict[str, Json] = field(default_factory=dict)
    recurring_runs: dict[str, Json] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stores = {"experiments": self.experiments, "runs": self.runs, "recurringruns": self.recurring_runs}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> KfpServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def create(self, kind: str, body: Json) -> Json:
        """An experiment, a run that stays pending, or a schedule that starts no runs."""
        if kind != "experiments":
            check_spec(body["pipeline_spec"])
            self.known("experiments", body.get("experiment_id", ""))
        elif bool(body.get("namespace")) != self.multi_user:
            raise Refusal(400, "Invalid input error: a namespace is needed in multi-user mode, and only there")
        identifier, state = _CREATED[kind]
        now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        made = body | state | {identifier: str(uuid.uuid4()), "created_at": now}
        self.stores[kind][made[identifier]] = made
        return made

    def known(self, kind: str, key: str) -> Json:
        if key not in self.stores[kind]:
            raise Refusal(404, f"ResourceNotFoundError: {key} not found")
        return self.stores[kind][key]


def _handler_of(server: KfpServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def _answer(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
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
    if kind not in server.stores:
        raise Refusal(404, f"Not Found: {path}")
    if method == "GET":
        return server.known(kind, key) if key else {}
    if verb == "terminate":
        return {}  # a run takes its time to end
    return server.create(kind, json.loads(content))
