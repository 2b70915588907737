"""A Ray cluster for this process and its children: join one, or start one on this machine."""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ncsn import storage
from ncsn.config import Config
from ncsn.config.compute import ComputeConfig
from ncsn.environment import CODE, DASHBOARD
from ncsn.errors import UserError
from ncsn.runs.code import job_config, ray_environment
from ncsn.storage.heartbeat import LeaseExpired
from ncsn.storage.retry import limited

LOOPBACK = "127.0.0.1"
JOIN_SECONDS = 180.0  # how long nodes may still join a cluster that another process started

_OWN = "NCSN_OWN_RAY"
_POLL_SECONDS = 1.0
_LOG_LINES = 100  # of each log
_MOST_CHARACTERS = 500_000  # of all
_LOG_SECONDS = 20.0  # for the logs of all nodes: some may hang

_CONNECTING = threading.RLock()

_logger = logging.getLogger(__name__)
# Of `ray_cluster_meanwhile`: Ray warns that it leaves SIGTERM alone there, which is as it should be.
logging.getLogger(ray.init.__module__).addFilter(lambda record: not record.getMessage().startswith("SIGTERM handler"))


@contextmanager
def ray_cluster(config: Config | None = None, *, last_lines: str | None = None) -> Iterator[str]:
    """Connect to the cluster at RAY_ADDRESS, or start one on this machine that ends with the block.

    A cluster that it starts listens on loopback only and asks for a token. Its address is in the environment meanwhile,
    so that child processes join it. Ray ties its processes to this one: if this process is killed, they end too.

    The config decides the size of a cluster that is started; without one, as for a server, it is that of the machine
    and has the dashboard. A failure of the block leaves the workers' last lines at the URI `last_lines`.
    Yields the address of the cluster.
    """
    with ExitStack() as stack:
        with _CONNECTING, _own_sigterm():
            if ray.is_initialized():
                address = ray.get_runtime_context().gcs_address
            elif joined := os.environ.get("RAY_ADDRESS"):
                address = joined
                try:
                    ray.init(address=address, logging_level=logging.WARNING, runtime_env=_edited_code(address))
                except ValueError as error:
                    hint = "use HOST:PORT of the cluster, or unset it"
                    raise UserError("RAY_ADDRESS", f"not an address: {error}", hint=hint, value=address) from error
                stack.callback(ray.shutdown)
            else:
                address = _start(config)
                stack.callback(ray.shutdown, wait_for_processes=True)
                for name in ("RAY_ADDRESS", _OWN):
                    os.environ[name] = address
                    stack.callback(os.environ.pop, name)
        if last_lines is None:
            yield address
            return
        try:
            yield address
        except (RuntimeError, RayError) as error:
            if isinstance(error, LeaseExpired) or not keep_last_lines(last_lines, error):
                raise
            cause = error.cause if isinstance(error, RayTaskError) else error
            kind = "" if type(cause) is RuntimeError else f"{type(cause).__name__}: "
            first = next(iter(str(cause).strip().splitlines()), "")
            raise RuntimeError(f"{kind}{first}; the workers' last lines are in {last_lines}") from error


@contextmanager
def ray_cluster_meanwhile(config: Config) -> Iterator[Callable[[], str]]:
    """The same cluster, which starts while the block begins; the function that it yields waits for the address."""
    cluster = ray_cluster(config)
    # One thread for all of it, since the kernel ends Ray's processes with the thread that started them.
    with ThreadPoolExecutor(1, thread_name_prefix="ray") as thread:
        started = thread.submit(cluster.__enter__)
        try:
            yield started.result
        finally:
            thread.submit(lambda: None if started.exception() else cluster.__exit__(None, None, None))


@contextmanager
def cluster_for(config: Config, *, start: bool, join: bool = True, last_lines: str | None = None) -> Iterator[None]:
    """A cluster, or none if it is not worth it to `start` one: that takes longer than a single small call.

    With `join`, the cluster at RAY_ADDRESS is used in any case, if there is one.
    """
    if not start and not ray.is_initialized() and not (join and os.environ.get("RAY_ADDRESS")):
        if config.compute.use_gpu:
            import torch  # takes seconds, which `ncsn run` need not wait for

            if not torch.cuda.is_available():
                reason = "this machine has no GPU that torch can use"
                raise UserError("compute.use_gpu", reason, hint="set it to false", value=True)
        yield
        return
    with ray_cluster(config, last_lines=last_lines):
        require_resources(config)
        yield


def on_this_machine() -> bool:
    """Whether the cluster that would be joined or started is this machine alone."""
    return (os.environ.get("RAY_ADDRESS") or LOOPBACK).startswith(LOOPBACK)


def is_own() -> bool:
    """Whether this process, or one that started it, started the connected cluster, which is this machine alone."""
    return bool(os.environ.get(_OWN) == ray.get_runtime_context().gcs_address)


def needs_ray_train(compute: ComputeConfig) -> bool:
    """Whether tasks do not do for the workers on this machine: they may come and go, or share its GPUs."""
    return compute.num_workers != 1 and (compute.use_gpu or compute.min_workers != compute.max_workers)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's answer to SIGTERM: Ray installs one that aborts the process before it can clean up."""
    handler = signal.getsignal(signal.SIGTERM)
    if handler is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        yield
    except SystemExit:  # with an exit code of Ray's, since only its answer to SIGTERM raises this
        if callable(handler):
            signal.signal(signal.SIGTERM, handler)
            signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


def _edited_code(address: str) -> dict[str, Any] | None:
    """What brings this process's code to the workers of another cluster, unless the launcher of this job has."""
    code, job = os.environ.get(CODE), job_config().get("runtime_env", {})
    if code is None or os.environ.get(_OWN) == address or CODE in job.get("env_vars", {}):
        return None
    ours = ray_environment(code)
    os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"  # else Ray refuses modules beside those of a RayJob's template
    return ours | {"py_modules": [*ours["py_modules"], *job.get("py_modules", [])]}


_MOST_PER_CORE = 4  # threads of workers; with more, a machine does nothing else


def require_machine(compute: ComputeConfig) -> int:
    """The CPU cores that the workers need; `UserError` if this machine has no room for them, or too few GPUs."""
    count, cores, lack = compute.min_workers, os.cpu_count() or 1, ""
    if (wanted := count * compute.cpus_per_worker) > _MOST_PER_CORE * cores:
        lack = f"needs {wanted} CPU cores on this machine, which has {cores}"
    elif compute.use_gpu:
        import torch  # takes seconds

        if (gpus := torch.cuda.device_count()) < count:
            lack = f"needs {count} GPUs on this machine, which has {gpus}"
    if lack:
        hint = "lower it" + ", or set compute.use_gpu to false" * compute.use_gpu
        raise UserError("compute.num_workers", lack, hint=hint, value=compute.num_workers)
    return wanted


def _start(config: Config | None) -> str:
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        # A token for this process alone needs no file in the home folder. A cluster elsewhere has its own.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Nobody announces that this machine will be preempted, and a process that waits for it takes seconds to start.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # Ray's 15 more than this process has leaves them a tenth of a core that somebody else uses.
    os.environ.setdefault("RAY_worker_niceness", "0")
    wanted = 0 if config is None else require_machine(config.compute)
    try:
        ray.init(
            address="local",  # without, Ray would join a cluster that another process started on this machine
            num_cpus=max(os.cpu_count() or 1, wanted),
            # Its ten processes are for people, and for Ray Train, which asks them what it may clean up.
            include_dashboard=config is None or bool(os.environ.get(DASHBOARD)) or needs_ray_train(config.compute),
            dashboard_host=LOOPBACK,
            logging_level=logging.WARNING,
        )
    except Exception as error:  # Ray raises these of any class, with a page of its logs as the message
        load = f"{os.getloadavg()[0]:.0f} processes want {os.cpu_count()} cores"
        raise RuntimeError(
            f"Ray did not start on this machine, where {load}: run the same command again when it is less busy, or add "
            "--traceback to see Ray's own message"
        ) from error
    if ray.util.get_node_ip_address() != LOOPBACK:
        ray.shutdown()
        raise RuntimeError(
            "Ray was imported before ncsn.distributed, or RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER is set to 1, so its "
            f"servers would listen beyond {LOOPBACK}; import ncsn.distributed first or unset the variable"
        )
    address: str = ray.get_runtime_context().gcs_address
    return address


def ray_tags() -> dict[str, str]:
    """Names of this work in Ray's dashboard and logs; empty without a cluster."""
    if not ray.is_initialized():
        return {}
    context = ray.get_runtime_context()
    tags = {"ray.job_id": context.get_job_id(), "ray.session": context.get_session_name()}
    # A second `init` only returns what this process is connected to.
    with _own_sigterm():
        dashboard = ray.init(ignore_reinit_error=True, logging_level=logging.WARNING).dashboard_url
    if dashboard and not is_own():  # else the page ends with this process
        tags["ray.dashboard_url"] = dashboard if "://" in dashboard else f"http://{dashboard}"
    metadata = job_config().get("metadata", {})  # of the Jobs API; empty if the process was not submitted there
    names = {"ray.submission_id": "job_submission_id", "ray.job_name": "job_name"}
    return tags | {tag: metadata[name] for tag, name in names.items() if name in metadata}


def require_resources(config: Config) -> None:
    """Refuse work that the cluster can never start, instead of waiting forever."""
    if autoscales():
        return
    compute, ends = config.compute, 0.0
    workers = compute.min_workers
    needed = {"CPU": workers * compute.cpus_per_worker, "GPU": workers if compute.use_gpu else 0}
    hints = {"CPU": "lower it or compute.cpus_per_worker", "GPU": "lower it, or set compute.use_gpu to false"}
    while True:
        have = ray.cluster_resources()
        short = next((kind for kind, count in needed.items() if count > have.get(kind, 0)), None)
        if short is None:
            if ends:
                _logger.warning("the cluster is large enough now")
            return
        reason = f"needs {needed[short]} {short}s, but the cluster has {have.get(short, 0):g}"
        lack = UserError("compute.num_workers", reason, hint=hints[short], value=compute.num_workers)
        if is_own():
            raise lack
        if not ends:
            # On Kubernetes the driver restarts as soon as a lost head is replaced, half a minute before the workers
            # are back.
            _logger.warning("%s; waiting %d s for more nodes", lack, JOIN_SECONDS)
            ends = time.monotonic() + JOIN_SECONDS
        if time.monotonic() > ends:
            raise RuntimeError(f"{lack} (waited {JOIN_SECONDS:g} s for more nodes)")
        time.sleep(_POLL_SECONDS)


def autoscales() -> bool:
    """Whether KubeRay's autoscaler adds nodes; it sets this variable on the head and its workers."""
    return os.environ.get("RAY_ENABLE_AUTOSCALER_V2") is not None


def keep_last_lines(uri: str, error: BaseException) -> bool:
    """Write to `uri` the whole error and what the processes of this Ray job wrote last; whether there was anything.

    Ray has their logs on the nodes, which a cluster takes along. What workers print is in their driver's log too, but
    without what it drops as repeated, or was still on its way. Processes that are gone are among them, as long as their
    node is there.
    """
    parts = list[str]()
    # In a thread, since Ray's client would wait for a head that is gone.
    thread = threading.Thread(target=_collect, args=(parts,), name="last-lines", daemon=True)
    thread.start()
    thread.join(_LOG_SECONDS)
    if not parts:
        return False
    with suppress(OSError), limited(_LOG_SECONDS):
        storage.write_text(uri, "\n".join([*traceback.format_exception(error), *parts])[:_MOST_CHARACTERS])
        return True
    return False


def _collect(parts: list[str]) -> None:
    task: Any = ray.remote(num_cpus=0)(_last_lines_here)
    job, reading = ray.get_runtime_context().get_job_id(), list[Any]()
    for node in (node for node in ray.nodes() if node["Alive"]):
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        reading.append(task.options(scheduling_strategy=there).remote(job, node["NodeManagerAddress"]))
    while reading:
        done, reading = ray.wait(reading)
        with suppress(RayError):  # this node ends
            parts.extend(ray.get(done[0]))


def _last_lines_here(job: str, address: str) -> list[str]:
    """What each process of a Ray job on this node wrote last. No dashboard needs to run for it."""
    parts, node = list[str](), cast("Any", ray._private.worker._global_node)
    for log in sorted(Path(node.get_logs_dir_path()).glob("worker-*")):
        with log.open(errors="replace") as file:
            # Ray marks where a job's lines begin. The cluster may have other people's jobs.
            if not file.readline().startswith(f":job_id:{job}"):
                continue
            last = deque((line for line in file if not line.startswith((":job_id:", ":task_name:"))), _LOG_LINES)
        if text := re.sub(r"\x1b\[[0-9;]*m", "", "".join(last)).strip("\n"):
            parts.append(f"--- {address} {log.name}\n{text}\n")
    return parts
