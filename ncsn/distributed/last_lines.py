"""The last lines of the workers' logs, for the store: Ray has them on the nodes, which a cluster takes along.

What workers print is in their driver's log too, but without what it drops as repeated, or was still on its way.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import ray

from ncsn import storage
from ncsn.storage.retry import limited

LINES = 100  # of each log
MOST_CHARACTERS = 500_000  # of all
SECONDS = 20.0  # for all nodes: some may hang
_TIMEOUT = 5  # seconds


def keep_last_lines(uri: str, error: BaseException) -> bool:
    """Write to `uri` the whole error and what the processes of this Ray job wrote last; whether there was anything.

    Processes that are gone are among them, as long as their node is there.
    """
    from ray.util.state.exception import RayStateApiException  # takes a second, which only a failure waits for

    parts = list[str]()

    def collect() -> None:
        job = ray.get_runtime_context().get_job_id()
        for node in (node for node in ray.nodes() if node["Alive"]):
            with suppress(OSError, RayStateApiException):  # this node's agent has not started, or ends
                parts.extend(_parts_of(node["NodeID"], node["NodeManagerAddress"], job))

    # In a thread, since Ray's client would wait for a dashboard without a limit.
    thread = threading.Thread(target=collect, name="last-lines", daemon=True)
    thread.start()
    thread.join(SECONDS)
    if not parts:
        return False
    with suppress(OSError), limited(SECONDS):
        storage.write_text(uri, "\n".join([*traceback.format_exception(error), *parts])[:MOST_CHARACTERS])
        return True
    return False


def _parts_of(node: str, address: str, job: str) -> Iterator[str]:
    from ray.util.state import get_log, list_logs

    found = list_logs(node_id=node, glob_filter="worker-*", timeout=_TIMEOUT)
    for name in sorted(name for names in found.values() for name in names):
        settings: dict[str, Any] = {"node_id": node, "filename": name, "timeout": _TIMEOUT, "errors": "replace"}
        # Ray marks where a job's lines begin. The cluster may have other people's jobs.
        if not next(get_log(**settings), "").startswith(f":job_id:{job}"):
            continue
        text = "".join(get_log(**settings, tail=LINES, filter_ansi_code=True))
        lines = [line for line in text.splitlines() if line and not line.startswith((":job_id:", ":task_name:"))]
        if lines:
            yield "\n".join([f"--- {address} {name}", *lines, ""])
