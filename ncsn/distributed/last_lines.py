"""The last lines of the workers' logs, for the store: Ray has them on the nodes, which a cluster takes along.

What workers print is in their driver's log too, but without what it drops as repeated, or was still on its way.
"""

from __future__ import annotations

import threading
import traceback
from contextlib import suppress
from functools import partial

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
    parts = list[str]()
    # In a thread, since Ray's client would wait for a dashboard without a limit.
    thread = threading.Thread(target=_collect, args=(parts,), name="last-lines", daemon=True)
    thread.start()
    thread.join(SECONDS)
    if not parts:
        return False
    with suppress(OSError), limited(SECONDS):
        storage.write_text(uri, "\n".join([*traceback.format_exception(error), *parts])[:MOST_CHARACTERS])
        return True
    return False


def _collect(parts: list[str]) -> None:
    from ray.util.state import get_log, list_logs  # takes a second, which only a failure waits for
    from ray.util.state.exception import RayStateApiException

    job = ray.get_runtime_context().get_job_id()
    for node in (node for node in ray.nodes() if node["Alive"]):
        with suppress(OSError, RayStateApiException):  # this node's agent has not started, or ends
            found = list_logs(node_id=node["NodeID"], glob_filter="worker-*", timeout=_TIMEOUT)
            for name in sorted(name for names in found.values() for name in names):
                log = partial(get_log, node_id=node["NodeID"], filename=name, timeout=_TIMEOUT, errors="replace")
                # Ray marks where a job's lines begin. The cluster may have other people's jobs.
                if not next(log(), "").startswith(f":job_id:{job}"):
                    continue
                text = "".join(log(tail=LINES, filter_ansi_code=True))
                lines = [
                    line for line in text.splitlines() if line and not line.startswith((":job_id:", ":task_name:"))
                ]
                if lines:
                    parts.append("\n".join([f"--- {node['NodeManagerAddress']} {name}", *lines, ""]))
