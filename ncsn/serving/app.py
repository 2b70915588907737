"""The model as an application of Ray Serve: a front that speaks HTTP, and replicas that make images.

Images are a function of the request alone. So when a replica is lost with what the front has accepted, the front asks
another one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable
from functools import partial
from importlib import resources
from typing import Any
from urllib.request import urlopen

import ray
import torch
from numpy.typing import NDArray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve._private import replica
from ray.serve.config import DeploymentActorConfig
from ray.util.metrics import Counter, Gauge, Histogram
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from ncsn.distributed.cluster import LOOPBACK, ray_cluster
from ncsn.errors import UserError
from ncsn.model.generate import generate_joined
from ncsn.runs.folder import DEFAULT_ROOT
from ncsn.serving import asked
from ncsn.serving.batches import Batches, Busy
from ncsn.tracking.client import client_at, mlflow_errors, one_line, server_uri, shown
from ncsn.tracking.promotion import SCHEME, resolve_version
from ncsn.tracking.registry import load_version

NAME = "ncsn"
POLL_SECONDS = 10.0  # between two looks at the alias
_LOAD_SECONDS = 600.0  # after which another replica may load, whatever became of the one before
_LOST_SECONDS = 120.0  # for which a request waits for another replica
_MOST_BYTES = 65536  # of a request
_MOST_REQUESTS = 1000  # at once, of a replica: enough for full batches of single images
_TURN = "turn"
_QUIET = {"log_level": "WARNING", "enable_access_log": False}

_logger = logging.getLogger("ray.serve")


class Turn:
    """Lets one replica after another load a version, so that the others have their processors and memory."""

    def __init__(self) -> None:
        self._holder, self._until = "", 0.0

    def take(self, who: str) -> bool:
        """Whether `who` may load now, for at most `_LOAD_SECONDS`."""
        now = time.monotonic()
        if self._holder not in ("", who) and now < self._until:
            return False
        self._holder, self._until = who, now + _LOAD_SECONDS
        return True

    def give_back(self, who: str) -> None:
        if self._holder == who:
            self._holder = ""


def _call_on_loopback() -> None:
    """Let this replica be called on loopback only, if its node is there."""
    # Replicas call each other by pickles, without a password, and Ray Serve 2.60 listens for them at all addresses.
    if ray.util.get_node_ip_address() == LOOPBACK:
        name = "add_port_to_grpc_server"
        vars(replica)[name] = partial(_add_port, vars(replica)[name])


def _add_port(add: Callable[[Any, str], int], server: Any, address: str) -> int:
    return add(server, address.replace("[::]", LOOPBACK))


class Sampler:
    """Makes images of the version that the address names; loads another one beside it when the alias moves."""

    def __init__(self, address: str, registry: str) -> None:
        _call_on_loopback()
        self._address, self._registry = address, registry or server_uri(None, root=DEFAULT_ROOT)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._served = load_version(self._registry, address, device=self._device)  # name and network
        self._id = uuid.uuid4().hex
        self._images = Counter("ncsn_serve_images", "Images made.", ("model",))
        self._sizes = Histogram("ncsn_serve_batch_images", "Images of a batch.", [1, 4, 16, 64, 256, 1024])
        self._seconds = Histogram("ncsn_serve_batch_seconds", "Seconds of a batch.", [0.1, 0.3, 1, 3, 10, 30, 100])
        self._version = Gauge("ncsn_serve_version", "The version that is served.", ("model",))
        self._batches = Batches(self._make)
        threading.Thread(target=self._follow, name="follow", daemon=True).start()

    def _make(self, trained: Any, parts: Any) -> NDArray[Any]:
        started = time.perf_counter()
        images = generate_joined(trained, parts, device=self._device)
        self._seconds.observe(time.perf_counter() - started)
        self._sizes.observe(len(images))
        self._images.inc(len(images), {"model": self._served[0].rpartition("/")[0]})
        return images

    def _follow(self) -> None:
        while True:
            name, _ = self._served
            model, _, version = name.rpartition("/")
            self._version.set(float(version), {"model": model})
            time.sleep(POLL_SECONDS)
            try:
                with mlflow_errors(self._registry):
                    found = resolve_version(client_at(self._registry), self._address)
                if name == (new := f"{SCHEME}{found.name}/{found.version}"):
                    continue
                turn = serve.get_deployment_actor(_TURN)
                if ray.get(turn.take.remote(self._id)):
                    try:
                        self._served = load_version(self._registry, new, device=self._device)
                    finally:
                        ray.get(turn.give_back.remote(self._id))
                    _logger.warning("%s is served in place of %s", new, name)
            except Exception as error:  # noqa: BLE001 - the version that is loaded goes on
                _logger.warning("%s stays: %s", name, one_line(error))

    async def sample(self, wanted: asked.Asked) -> tuple[int, str, bytes]:
        """HTTP status, the version, and the file or a line that says what is wrong."""
        name, trained = self._served
        try:
            future = self._batches.put(trained, asked.settings(trained, wanted), wanted.number)
            images = await asyncio.wrap_future(future)
            limits = trained.config.data.pixels.limits
            return 200, name, await asyncio.to_thread(asked.answer, images, wanted.format, limits=limits)
        except UserError as error:
            return 400, name, _line(error)
        except Busy:
            return 503, name, b"too many images wait; try again later\n"

    def describe(self) -> dict[str, Any]:
        """What the page shows."""
        name, trained = self._served
        config, classes = trained.config, trained.classes
        return {
            "model": name,
            "image_shape": config.data.stored_shape,
            "classes": [] if classes is None else classes.names,
            "sampler": config.sampling.sampler.kind,
            "seed": config.sampling.seed,
            "most_images": asked.MOST_IMAGES,
        }


class Front:
    """Takes requests, and asks the replicas until one of them has answered."""

    def __init__(self, samplers: Any) -> None:
        _call_on_loopback()
        self._samplers = samplers
        self._page = resources.files("ncsn.serving").joinpath("page.html").read_text()

    async def __call__(self, request: Request) -> Response:
        match request.method, request.url.path.rstrip("/"):
            case "GET", "":
                return Response(self._page, media_type="text/html")
            case "GET", "/model":
                return JSONResponse(await self._ask("describe"))
            case "GET", "/health":
                return JSONResponse({"status": "ok", "model": (await self._ask("describe"))["model"]})
            case "GET", "/metrics":
                return PlainTextResponse(await asyncio.to_thread(_node_metrics))
            case "POST", "/images":
                return await self._images(request)
            case _, "" | "/model" | "/health" | "/metrics" | "/images":
                return PlainTextResponse("not this method\n", 405)
        return PlainTextResponse("nothing is here; POST to /images, or GET /, /model, /health or /metrics\n", 404)

    async def _images(self, request: Request) -> Response:
        # A page of another origin cannot send this type unless it is allowed to.
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            return PlainTextResponse("Content-Type must be application/json\n", 415)
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > _MOST_BYTES:
                return PlainTextResponse(f"a request has at most {_MOST_BYTES:,} bytes\n", 413)
        try:
            wanted = asked.read(body)
        except UserError as error:
            return PlainTextResponse(_line(error), 400)
        status, model, content = await self._ask("sample", wanted)
        media = asked.MEDIA[wanted.format] if status == 200 else "text/plain"
        return Response(content, status, {"X-NCSN-Model": model}, media_type=media)

    async def _ask(self, method: str, *arguments: Any) -> Any:
        ends = time.monotonic() + _LOST_SECONDS
        while True:
            try:
                return await getattr(self._samplers, method).remote(*arguments)
            except RayActorError:  # the replica is gone
                if time.monotonic() > ends:
                    raise
                await asyncio.sleep(0.1)


def _line(error: UserError) -> bytes:
    return f"{'; '.join(str(error).splitlines())}\n".encode()


def _node_metrics() -> str:
    """What Ray and Serve count on this node, for Prometheus; ours are among them as ray_ncsn_serve_*."""
    here = ray.get_runtime_context().get_node_id()
    (node,) = [each for each in ray.nodes() if each["NodeID"] == here]
    with urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=10) as found:
        text: str = found.read().decode()
    return text


def build(args: dict[str, str]) -> serve.Application:
    """The application for `args` of Serve's config: the `model`, models:/NAME@ALIAS, in the environment's registry.

    Serve's config sets the number of replicas of Front and Sampler and the processors of each.
    """
    return application(args["model"])


def application(model: str, *, registry: str = "", **options: Any) -> serve.Application:
    """The application with these options of the replicas that make images."""
    turn = DeploymentActorConfig(name=_TURN, actor_class=ray.remote(Turn), actor_options={"num_cpus": 0})
    samplers = serve.deployment(max_ongoing_requests=_MOST_REQUESTS, deployment_actors=[turn], **options)(Sampler)
    front = serve.deployment(max_ongoing_requests=_MOST_REQUESTS, ray_actor_options={"num_cpus": 0})(Front)
    return front.bind(samplers.bind(model, registry))


def run(model: str, *, registry: str, port: int, replicas: int, ready: Callable[[], object]) -> None:
    """Serve a registered model on loopback until SIGINT or SIGTERM; `ready` is called when it answers.

    Each replica has its share of this machine's processors, and a GPU if there are enough.
    """
    with mlflow_errors(registry):
        resolve_version(client_at(registry), model)
    with ray_cluster():
        have = ray.cluster_resources()
        if replicas > (cores := int(have.get("CPU", 0))):  # they would be waited for forever
            raise UserError("--replicas", f"there are {cores} CPU cores, of which each needs one", value=replicas)
        if serve.status().proxies:  # of another program, which listen at its port, and whose application this one ends
            raise UserError(
                "RAY_ADDRESS", "this cluster serves already", hint="unset it to serve on this machine alone"
            )
        gpus = 1 if have.get("GPU", 0) >= replicas else 0
        share = {"num_cpus": cores // replicas, "num_gpus": gpus}
        serve.start(proxy_location="HeadOnly", http_options={"host": LOOPBACK, "port": port}, logging_config=_QUIET)
        # With a password, it stays in the environment that it is from, which the replicas inherit.
        hidden = shown(registry) != registry == os.environ.get("MLFLOW_TRACKING_URI")
        wanted = application(model, registry="" if hidden else registry, num_replicas=replicas, ray_actor_options=share)
        serve.run(wanted, name=NAME, logging_config=_QUIET)
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        ready()
        stop.wait()
        serve.delete(NAME)  # what was accepted is answered first
        serve.shutdown()  # the cluster may go on
