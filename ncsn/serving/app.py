"""The model as an application of Ray Serve: a front that speaks HTTP, and replicas that make images.

Images are a function of the request alone. So when a replica is lost with what the front has accepted, the front asks
another one.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib import resources
from queue import SimpleQueue
from typing import Any
from urllib.request import urlopen

import ray
import torch
from numpy.typing import NDArray
from ray import serve
from ray.exceptions import ActorAlreadyExistsError, RayActorError
from ray.serve._private import replica
from ray.util.metrics import Counter, Histogram
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from ncsn.distributed.cluster import LOOPBACK, is_own, ray_cluster
from ncsn.errors import UserError
from ncsn.model.build import tune_cuda
from ncsn.model.generate import generate_joined
from ncsn.runs.layout import DEFAULT_ROOT
from ncsn.serving import PROXY, image_requests
from ncsn.serving.batches import Batches, Busy
from ncsn.steps.address import NamedModel, load_guided, resolve
from ncsn.tracking.client import one_line

NAME = "ncsn"
POLL_SECONDS = 10.0  # between two looks at the alias
_LOST_SECONDS = 120.0  # for which a request waits for another replica
_REQUEST_SECONDS = 30  # in which a request comes
_MOST_CHARACTERS = 1000  # of what is wrong with it
# At once, more than come: Serve lets the next ones wait without a turn, and ends a replica that is full, since it
# cannot answer that it is well. `Connection` and `Batches` have the limits.
_MOST_REQUESTS = 100_000
_QUIET = {"log_level": "ERROR", "enable_access_log": False}
_HOW_TO_ASK = """GET /, /health or /metrics; for images: \
curl -H 'Content-Type: application/json' -d '{"number": 16, "seed": 1}' %simages > grid.png
"""

_logger = logging.getLogger(__name__)


class Turn:
    """A named actor, held by the replica that loads a version while the others wait; Ray ends it with the replica."""


def _call_on_loopback() -> None:
    """Let this replica be called on loopback only, if its node is there."""
    # Ray Serve 2.60 listens for the other replicas' pickles at all addresses; the cluster's token alone guards them.
    if ray.util.get_node_ip_address() == LOOPBACK:
        module = vars(replica)
        add = module["add_port_to_grpc_server"]
        module["add_port_to_grpc_server"] = lambda server, address: add(server, address.replace("[::]", LOOPBACK))


class Replica:
    """Makes images of what the address names; loads another network beside it when the alias moves."""

    def __init__(self, address: str, root: str, registry: str | None) -> None:
        _call_on_loopback()
        self._find = partial(resolve, address, key="ADDRESS", root=root, registry=registry)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        tune_cuda(self._device)
        self._served = self._load(self._find())  # name and network
        self._images = Counter("ncsn_serve_images", "Images made, by version.", ("model",))
        self._sizes = Histogram("ncsn_serve_batch_images", "Images of a batch.", [1, 4, 16, 64, 256, 1024])
        self._batches = Batches(self._make)
        threading.Thread(target=self._follow, name="follow", daemon=True).start()

    def _load(self, place: NamedModel) -> tuple[str, Any]:
        with ThreadPoolExecutor(1) as ends:  # and with it its threads of OpenMP, see `Batches`
            return place.name, ends.submit(load_guided, place, device=self._device).result()

    def _make(self, trained: Any, parts: Any) -> NDArray[Any]:
        images = generate_joined(trained, parts, device=self._device)
        self._sizes.observe(len(images))
        return images

    def _follow(self) -> None:
        while True:
            time.sleep(POLL_SECONDS)
            name, _ = self._served
            try:
                found = self._find()
                if name == found.name:
                    continue
                turn: Any = ray.remote(Turn).options(name="ncsn-turn", num_cpus=0).remote()
                try:
                    self._served = self._load(found)
                finally:
                    ray.kill(turn)
                _logger.warning("%s is served in place of %s", found.name, name)
            except ActorAlreadyExistsError:
                continue
            except Exception as error:  # noqa: BLE001 - the version that is loaded goes on
                _logger.warning("%s stays: %s", name, one_line(error))

    async def sample(self, wanted: image_requests.ImageRequest) -> tuple[int, str, bytes]:
        """HTTP status, the version, and the file or a line that says what is wrong."""
        name, trained = self._served
        try:
            sampling = image_requests.settings(trained, wanted)
            evaluations = image_requests.evaluations(trained, sampling, wanted.count)
            images = await self._batches.images(trained, sampling, wanted.count, evaluations)
            self._images.inc(wanted.count, {"model": name})  # another version may be served by now
            limits = trained.config.data.pixels.limits
            return 200, name, await asyncio.to_thread(image_requests.answer, images, wanted.format, limits=limits)
        except UserError as error:
            return 400, name, _line(error)
        except Busy as busy:
            return 503, name, f"{busy}\n".encode()

    def describe(self) -> dict[str, Any]:
        """What the page needs to know."""
        name, trained = self._served
        classes = [] if trained.classes is None else trained.classes.names
        guided = False
        with suppress(UserError):
            guided = bool(image_requests.settings(trained, image_requests.ImageRequest(guidance=2.0)))
        return {
            "status": "ok",
            "model": name,
            "classes": classes,
            "guided": guided,
            "most_images": image_requests.MOST_IMAGES,
        }


class Front:
    """Takes requests, and asks the replicas until one of them has answered."""

    def __init__(self, samplers: Any) -> None:
        _call_on_loopback()
        self._samplers, self._asking, self._ends = samplers, 0, False
        self._page = resources.files("ncsn.serving").joinpath("page.html").read_text()

    async def __call__(self, request: Request) -> Response:
        match request.method, request.url.path.rstrip("/"):
            case "GET", "":
                return Response(self._page, media_type="text/html")
            case "GET", "/health":
                return JSONResponse(await self._ask("describe"))
            case "GET", "/metrics":
                return PlainTextResponse(await asyncio.to_thread(_node_metrics))
            case "POST", "/images":
                return await self._images(request)
        known = request.url.path.rstrip("/") in ("", "/health", "/metrics", "/images")
        return PlainTextResponse(_HOW_TO_ASK % request.base_url, 405 if known else 404)

    async def _images(self, request: Request) -> Response:
        # A page of another origin cannot send this type unless it is allowed to.
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            return PlainTextResponse("Content-Type must be application/json\n", 415)
        try:
            wanted = image_requests.read(await request.body())
        except ClientDisconnect:
            return Response(status_code=408)  # to nobody
        except UserError as error:
            return PlainTextResponse(_line(error), 400)
        if self._ends:
            return PlainTextResponse("this server ends\n", 503)
        self._asking += 1
        try:
            status, model, content = await self._ask("sample", wanted)
        finally:
            self._asking -= 1
        media = image_requests.MEDIA[wanted.format] if status == 200 else "text/plain"
        return Response(content, status, {"X-NCSN-Model": model}, media_type=media)

    async def end(self) -> None:
        """Accept no more requests, and return when those that were accepted are answered."""
        self._ends = True
        while self._asking:
            await asyncio.sleep(0.05)

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
    return f"{'; '.join(str(error).splitlines())[:_MOST_CHARACTERS]}\n".encode()


def _node_metrics() -> str:
    """What Ray and Serve count on this node, for Prometheus; ours are among them as ray_ncsn_serve_*."""
    here = ray.get_runtime_context().get_node_id()
    (node,) = [each for each in ray.nodes() if each["NodeID"] == here]
    with urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=10) as found:
        text: str = found.read().decode()
    return text


def build(args: dict[str, str]) -> serve.Application:
    """The application for `args` of Serve's config, which sets the replicas of Front and Replica."""
    return application(args["model"])


def application(
    address: str, *, root: str = DEFAULT_ROOT, registry: str | None = None, **options: Any
) -> serve.Application:
    """The application for what an address names in a store and a registry, with these options of Replica."""
    samplers = serve.deployment(max_ongoing_requests=_MOST_REQUESTS, **options)(Replica)
    front = serve.deployment(max_ongoing_requests=_MOST_REQUESTS, ray_actor_options={"num_cpus": 0})(Front)
    return front.bind(samplers.bind(address, root, registry))


def run(place: NamedModel, *, port: int, replicas: int, ready: Callable[[], object]) -> None:
    """Serve a trained network on loopback until SIGINT or SIGTERM; `ready` is called when it answers.

    Each replica has its share of this machine's processors, and a GPU if there are enough.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # of this process
    with ray_cluster():
        have = ray.cluster_resources()
        if replicas > (cores := int(have.get("CPU", 0))):  # Ray would wait for them without end.
            raise UserError("--replicas", f"there are {cores} CPU cores, of which each needs one", value=replicas)
        if serve.status().proxies:  # Another program's, whose application and port this one would replace.
            hint = "unset it to serve on this machine alone"
            raise UserError("RAY_ADDRESS", "this cluster serves already", hint=hint)
        gpus = 1 if have.get("GPU", 0) >= replicas else 0
        share = {"num_cpus": cores // replicas, "num_gpus": gpus}
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": LOOPBACK, "port": port, "keep_alive_timeout_s": _REQUEST_SECONDS},
            logging_config=_QUIET,
            # One's own cluster has this process's variables, and others make Ray start slower.
            controller_options=None if is_own() else {"runtime_env": {"env_vars": PROXY}},
        )
        options = {"num_replicas": replicas, "ray_actor_options": share}
        wanted = application(place.address, root=place.root, registry=place.registry, **options)
        front: Any = serve.run(wanted, name=NAME, logging_config=_QUIET)
        stop = SimpleQueue[None]()  # an Event is locked for a moment of its `wait`, and its `set` would wait for that
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.put(None))
        ready()
        stop.get()
        with suppress(TimeoutError):
            front.end.remote().result(timeout_s=_LOST_SECONDS)
        if not is_own():  # else it ends now
            serve.delete(NAME)
            serve.shutdown()
