"""Fault injection: the failures that `--inject` asks for, each once per run.

A fault is as real as one process can make it: a SIGKILL is the kernel's, the full disk is `/dev/full`, the NaN goes
through the network. It belongs to one call of a command, never to the config: it changes no result, so it must not
change the name of a run.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import ray
import torch

from ncsn import storage
from ncsn.errors import UserError
from ncsn.model.checkpoint_store import CheckpointStore
from ncsn.runs.folder import RunFolder
from ncsn.storage import retry
from ncsn.storage.cache import cache_folder
from ncsn.training.loop import LoopHooks, Training

FORMS = {
    "kill-worker": "kill-worker@images=N",
    "kill-node": "kill-node@images=N",
    "cut-checkpoint": "cut-checkpoint@images=N",
    "store-down": "store-down@images=N:TIME",
    "store-errors": "store-errors@images=N:SHARE",
    "tracking-down": "tracking-down@images=N:TIME",
    "nan": "nan@images=N",
    "preempt": "preempt@images=N",
    "disk-full": "disk-full@images=N",
}
KINDS = {"train": tuple(FORMS), "sample": ("store-down", "store-errors")}  # by step
ERRORS_SECONDS = 60.0  # how long `store-errors` lasts
NOTICE_SECONDS = 30.0  # from the notice of a preemption to the end of the node; clouds give 30 to 120
FULL_DEVICE = Path("/dev/full")  # the kernel answers every write to it with ENOSPC

_FAULT = re.compile(r"(?P<kind>[a-z-]+)@images=(?P<images>\d+)(:(?P<argument>.+))?")
_TIME = re.compile(r"(\d+(?:\.\d+)?)(s|m)")
_SHARE = re.compile(r"0?\.\d+|1(\.0*)?")
_TIMED = ("store-down", "tracking-down")
_BY_RANK_0 = (*_TIMED, "store-errors", "disk-full", "cut-checkpoint")  # only rank 0 uses what they take away

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fault:
    """One failure to inject."""

    kind: str  # one of `FORMS`
    images: int  # the image that triggers it: of the training order, or of the samples
    seconds: float = 0.0  # how long a server is unreachable
    share: float = 1.0  # of the calls that fail meanwhile

    @property
    def name(self) -> str:
        """Name of the file by which the run remembers that it happened."""
        return f"{self.kind}-{self.images}"


def parse(text: str, *, step: str) -> Fault:
    """Read `KIND@images=N`, followed by `:TIME` or `:SHARE` where the kind has one."""
    found = _FAULT.fullmatch(text)
    if found is None or found["kind"] not in KINDS[step]:
        forms = ", ".join(FORMS[kind] for kind in KINDS[step])
        raise UserError("--inject", f"not a fault of {step}", hint=f"use {forms}", value=text)
    kind, images, argument = found["kind"], int(found["images"]), found["argument"]
    if kind in _TIMED and (duration := _TIME.fullmatch(argument or "")):
        return Fault(kind, images, seconds=float(duration[1]) * {"s": 1, "m": 60}[duration[2]])
    if kind == "store-errors" and _SHARE.fullmatch(argument or "") and float(argument) > 0:
        return Fault(kind, images, seconds=ERRORS_SECONDS, share=float(argument))
    if argument is None and kind not in (*_TIMED, "store-errors"):
        return Fault(kind, images)
    hint = "a TIME is like 30s or 2m, a SHARE is in (0, 1]"
    raise UserError("--inject", f"not of the form {FORMS[kind]}", hint=hint, value=text)


def parse_faults(texts: Sequence[str], *, step: str, folder: RunFolder) -> FaultInjector:
    """The injector of the faults that `--inject` asks for."""
    faults = [parse(text, step=step) for text in texts]
    for fault, text in zip(faults, texts, strict=True):
        if [other.name for other in faults].count(fault.name) > 1:
            raise UserError("--inject", "given twice; each fault happens once", value=text)
        if fault.kind.startswith("store-") and storage.is_local(folder.uri):
            raise UserError(
                "--inject",
                f"needs a store on a server, but {folder.uri} is a folder",
                hint="set storage.root to s3://BUCKET/PREFIX",
                value=text,
            )
    return FaultInjector(tuple(faults), folder)


@dataclass
class FaultInjector(LoopHooks):
    """Triggers the faults of one call; picklable, so that it reaches the workers.

    The run remembers below `faults/` what has happened: a retried worker, and the same command again, are spared.
    """

    faults: tuple[Fault, ...]
    folder: RunFolder
    _disk_full: bool = field(default=False, repr=False)

    @contextmanager
    def outages_shared(self) -> Iterator[None]:
        """Context manager: this process, and what it starts meanwhile, share the outages of this node."""
        if not self.faults:
            yield
            return
        digest = hashlib.sha256(self.folder.uri.encode()).hexdigest()[:12]
        os.environ[retry.OUTAGE_VARIABLE] = str(cache_folder() / "outages" / digest)
        try:
            yield
        finally:
            del os.environ[retry.OUTAGE_VARIABLE]

    def before_step(self, training: Training) -> None:
        """Trigger the faults due in this batch."""
        context, size, seen = training.context, training.config.train.batch_size, training.state.images_seen
        self.trigger(range(seen, seen + size), share=context.share(size), rank=context.rank, training=training)

    def before_save(self, folder: Path) -> None:
        """If the disk is to be full, have the kernel refuse the checkpoint."""
        if self._disk_full:
            (folder / "state.json").symlink_to(FULL_DEVICE)
            self._disk_full = False

    def trigger(
        self, images: range, *, share: range | None = None, rank: int = 0, training: Training | None = None
    ) -> None:
        """Trigger the faults due in these `images` of all workers, of which this one draws its `share`, by default all.

        The worker that would draw the image dies; rank 0 takes servers away.
        """
        own = images if share is None else images[share.start : share.stop]
        for fault in self.faults:
            due = rank == 0 and fault.images in images if fault.kind in _BY_RANK_0 else fault.images in own
            if due and storage.publish_once(storage.join(self.folder.faults, fault.name), b""):
                _logger.warning("injected: %s at image %d", fault.kind, fault.images)
                self._trigger(fault, training)

    def _trigger(self, fault: Fault, training: Training | None) -> None:
        if fault.kind == "kill-worker":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "kill-node":
            _kill_node()
        elif fault.kind == "cut-checkpoint":
            assert training is not None
            _cut_newest(training.checkpoints)
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "preempt":
            _announce_preemption()
        elif fault.kind == "nan":
            assert training is not None
            with torch.no_grad():
                next(training.state.network.parameters()).fill_(math.nan)
        elif fault.kind == "disk-full":
            self._disk_full = True
        elif fault.kind == "tracking-down":
            retry.start_outage("tracking", seconds=fault.seconds)
        else:
            retry.start_outage("store", seconds=fault.seconds, share=fault.share)


def _cut_newest(checkpoints: CheckpointStore) -> None:
    """Leave half of the weights of the newest checkpoint."""
    checkpoints.wait()
    name = next(checkpoints.names(), None)
    if name is None:
        raise UserError(
            "--inject",
            "there is no checkpoint yet",
            hint="use a number of images above train.checkpoint_every_images",
            value="cut-checkpoint",
        )
    weights = storage.join(checkpoints.uri, name, "weights.safetensors")
    content = storage.read_bytes(weights)
    storage.write_bytes(weights, content[: len(content) // 2])


def _kill_node() -> None:
    """Kill this worker and its raylet, which takes the node out of the cluster."""
    raylet = next(parent for parent in psutil.Process().parents() if parent.name() == "raylet")
    raylet.kill()
    os.kill(os.getpid(), signal.SIGKILL)


def _announce_preemption() -> None:
    """Tell Ray, as a cloud's agent would, that this node will be preempted, and end the node in time."""
    context = ray.get_runtime_context()
    notice = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", context.gcs_address]
    notice += ["--node-id", context.get_node_id(), "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    notice += ["--reason-message", "simulated", "--deadline-remaining-seconds", f"{NOTICE_SECONDS:.0f}"]
    subprocess.run(notice, check=True)  # noqa: S603
    end = threading.Timer(NOTICE_SECONDS, _kill_node)
    end.daemon = True
    end.start()
