"""Rehearsed failures: what `--inject` asks for, and striking at the right moment, once per run.

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
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import ray
import torch
from torch import nn

from ncsn import storage
from ncsn.data.training_images import cache_folder
from ncsn.errors import UserError
from ncsn.model.checkpoint_store import CHECKPOINTS, SNAPSHOT
from ncsn.storage import retry

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
"""Kind of fault -> how it is written."""
KINDS = {"train": tuple(FORMS), "sample": ("store-down", "store-errors")}
"""Step -> the faults it can rehearse."""
ERRORS_SECONDS = 60.0
"""How long a store that answers some calls with errors goes on doing so."""
NOTICE_SECONDS = 30.0
"""From the notice that a node will be taken to its end; clouds give 30 to 120."""
LISTED_SECONDS = 180.0
"""How long a checkpoint that is to be cut may take to Ray Train's list: longer than an outage of the store."""
FULL_DEVICE = Path("/dev/full")
"""The kernel answers every write to it with ENOSPC."""

_FAULT = re.compile(r"(?P<kind>[a-z-]+)@images=(?P<images>\d+)(:(?P<argument>.+))?")
_TIME = re.compile(r"(\d+(?:\.\d+)?)(s|m)")
_TIMED = ("store-down", "tracking-down")
_BY_RANK_0 = (*_TIMED, "store-errors", "disk-full")
"""What they take away is used by rank 0."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fault:
    """One failure to rehearse.

    Attributes:
        kind: One of `FORMS`.
        images: The image that it strikes at: of the training order, or of the samples.
        seconds: How long a server is away.
        share: Part of the calls that fail meanwhile.
    """

    kind: str
    images: int
    seconds: float = 0.0
    share: float = 1.0

    @property
    def name(self) -> str:
        """Under which the run remembers that it struck."""
        return f"{self.kind}-{self.images}"


def parse(text: str, *, step: str) -> Fault:
    """Read `KIND@images=N`, followed by `:TIME` or `:SHARE` where the kind has one.

    Raises:
        UserError: for a text that is no fault of the step.
    """
    kinds = KINDS[step]
    found = _FAULT.fullmatch(text)
    if found is None or found["kind"] not in kinds:
        raise UserError(
            "--inject", f"not a fault of {step}", hint=f"use {', '.join(FORMS[kind] for kind in kinds)}", value=text
        )
    kind, images, argument = found["kind"], int(found["images"]), found["argument"]
    wrong = UserError(
        "--inject",
        f"not of the form {FORMS[kind]}",
        hint="a TIME is for example 30s or 2m, a SHARE is in (0, 1]",
        value=text,
    )
    if kind in _TIMED:
        duration = _TIME.fullmatch(argument or "")
        if duration is None:
            raise wrong
        return Fault(kind, images, seconds=float(duration[1]) * {"s": 1, "m": 60}[duration[2]])
    if kind == "store-errors":
        if not re.fullmatch(r"0?\.\d+|1(\.0*)?", argument or "") or not float(argument) > 0:
            raise wrong
        return Fault(kind, images, seconds=ERRORS_SECONDS, share=float(argument))
    if argument is not None:
        raise wrong
    return Fault(kind, images)


def rehearsal(texts: Sequence[str], *, step: str, run_uri: str) -> Rehearsal:
    """What `--inject` asks for.

    Raises:
        UserError: for a text that is no fault, a fault that is given twice, or a store fault on a local folder.
    """
    faults = [parse(text, step=step) for text in texts]
    for fault, text in zip(faults, texts, strict=True):
        if [other.name for other in faults].count(fault.name) > 1:
            raise UserError("--inject", "given twice; each fault happens once", value=text)
        if fault.kind.startswith("store-") and storage.is_local(run_uri):
            raise UserError(
                "--inject",
                f"needs a store on a server, and {run_uri} is a folder",
                hint="set storage.root to s3://BUCKET/PREFIX",
                value=text,
            )
    return Rehearsal(tuple(faults), run_uri)


@dataclass
class Rehearsal:
    """The faults of one call; picklable, so that it reaches the workers.

    Attributes:
        faults: What is to fail.
        run_uri: Folder of the run, which remembers below `faults/` what has struck: a retried worker, and the same
            command again, are spared.
    """

    faults: tuple[Fault, ...] = ()
    run_uri: str = ""
    _disk_full: bool = field(default=False, repr=False)

    @contextmanager
    def outages_shared(self) -> Iterator[None]:
        """Let this process, and what it starts meanwhile, share the outages of this node."""
        if not self.faults:
            yield
            return
        digest = hashlib.sha256(self.run_uri.encode()).hexdigest()[:12]
        os.environ[retry.OUTAGE_VARIABLE] = str(cache_folder() / "outages" / digest)
        try:
            yield
        finally:
            del os.environ[retry.OUTAGE_VARIABLE]

    def strike(
        self,
        batch: range,
        *,
        share: range | None = None,
        rank: int = 0,
        network: nn.Module | None = None,
        saved: str = "",
    ) -> None:
        """Let fail what is due before the images `batch` are drawn.

        Args:
            batch: Places of the images of all workers.
            share: Which of them this worker draws, all by default. The worker that dies is the one that would draw
                the image.
            rank: This worker's; rank 0 takes servers away.
            network: What a NaN gets into.
            saved: Name of the newest checkpoint, which may still be on its way to the store; empty if there is none.
        """
        own = batch if share is None else batch[share.start : share.stop]
        for fault in self.faults:
            due = rank == 0 and fault.images in batch if fault.kind in _BY_RANK_0 else fault.images in own
            if due and storage.publish_once(storage.join(self.run_uri, "faults", fault.name), b""):
                _logger.warning("rehearsal: %s at image %d", fault.kind, fault.images)
                self._let_fail(fault, network, saved)

    def fill_disk(self, folder: Path) -> None:
        """If the disk is to be full: have the kernel refuse the checkpoint that is about to be written to `folder`."""
        if self._disk_full:
            (folder / "state.json").symlink_to(FULL_DEVICE)
            self._disk_full = False

    def _let_fail(self, fault: Fault, network: nn.Module | None, saved: str) -> None:
        if fault.kind == "kill-worker":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "kill-node":
            _kill_node()
        elif fault.kind == "cut-checkpoint":
            self._cut_checkpoint(saved)
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "preempt":
            _announce_preemption()
        elif fault.kind == "nan":
            assert network is not None
            with torch.no_grad():
                next(network.parameters()).fill_(math.nan)
        elif fault.kind == "disk-full":
            self._disk_full = True
        elif fault.kind == "tracking-down":
            retry.declare("tracking", seconds=fault.seconds)
        else:
            retry.declare("store", seconds=fault.seconds, share=fault.share)

    def _cut_checkpoint(self, name: str) -> None:
        """Leave half of the weights of a checkpoint on the store, once it is there and Ray Train has it on its list."""
        if not name:
            raise UserError(
                "--inject",
                "there is no checkpoint yet",
                hint="use a number of images above train.checkpoint_every_images",
                value="cut-checkpoint",
            )
        folder = storage.join(self.run_uri, CHECKPOINTS)
        snapshot = storage.join(folder, SNAPSHOT)
        give_up = time.monotonic() + LISTED_SECONDS
        while not storage.exists(snapshot) or f'"{name}"' not in storage.read_text(snapshot):
            assert time.monotonic() < give_up, f"Ray Train does not list {name}"
            time.sleep(0.1)
        weights = storage.join(folder, name, "weights.safetensors")
        content = storage.read_bytes(weights)
        storage.write_bytes(weights, content[: len(content) // 2])


def _kill_node() -> None:
    """Kill the raylet that this worker belongs to, which takes the node out of the cluster, and this worker."""
    raylet = next(parent for parent in psutil.Process().parents() if parent.name() == "raylet")
    raylet.kill()
    os.kill(os.getpid(), signal.SIGKILL)


def _announce_preemption() -> None:
    """Tell Ray, as a cloud's agent would, that this node will be taken, and take it when the time has come."""
    context = ray.get_runtime_context()
    notice = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", context.gcs_address]
    notice += ["--node-id", context.get_node_id(), "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    notice += ["--reason-message", "rehearsal", "--deadline-remaining-seconds", f"{NOTICE_SECONDS:.0f}"]
    subprocess.run(notice, check=True)  # noqa: S603
    end = threading.Timer(NOTICE_SECONDS, _kill_node)
    end.daemon = True
    end.start()
