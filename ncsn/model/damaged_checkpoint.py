"""What to do about a checkpoint that a worker found damaged: read it again, or go back to the one before."""

from __future__ import annotations

import json
from operator import itemgetter
from typing import Any

from ncsn import storage
from ncsn.model.checkpoint import DamagedError, verify
from ncsn.model.checkpoint_store import CHECKPOINTS, SNAPSHOT


def remedy(run_uri: str, damage: DamagedError) -> str:
    """See to it that the next attempt finds a whole checkpoint.

    A copy can be torn on its way to one node, by a full disk or a killed process. Only what is damaged in the store too
    is given up.

    Args:
        run_uri: Folder of the run.
        damage: What a worker found.

    Returns:
        What to say of it; nothing if Ray Train has no checkpoint of this run on its list.
    """
    uri = storage.join(run_uri, CHECKPOINTS, SNAPSHOT)
    snapshot = storage.read_json(uri) if storage.exists(uri) else {}
    if not snapshot.get("latest_checkpoint_result"):
        return ""
    name = snapshot["latest_checkpoint_result"]["checkpoint_dir_name"]
    if _is_whole(storage.join(run_uri, CHECKPOINTS, name)):
        return f"checkpoint {name} reached a worker damaged ({damage.reason}) and is whole in the store: read again"
    before = _forget_latest(run_uri, snapshot)
    instead = f"from {before}" if before else "from the start, for there is none before it"
    return f"checkpoint {name} is damaged ({damage.reason}): training went on {instead}"


def _is_whole(uri: str) -> bool:
    try:
        with storage.local_copy(uri) as folder:
            verify(folder)
    except (DamagedError, FileNotFoundError):
        return False
    return True


def _forget_latest(run_uri: str, snapshot: dict[str, Any]) -> str | None:
    """Take the latest checkpoint off Ray Train's list, so that it resumes from the one before; the name of that.

    Training comes to the same place again and puts a new one there; with the folder listed twice Ray Train would delete
    the new one with the old.
    """
    name = snapshot["latest_checkpoint_result"]["checkpoint_dir_name"]
    listed = zip(snapshot["checkpoint_results"], snapshot["checkpoint_report_indices"], strict=True)
    kept = [(result, index) for result, index in listed if result["checkpoint_dir_name"] != name]
    snapshot["checkpoint_results"] = [result for result, _ in kept]
    snapshot["checkpoint_report_indices"] = [index for _, index in kept]
    before = max(kept, key=itemgetter(1))[0] if kept else None
    snapshot["latest_checkpoint_result"] = before
    storage.write_text(storage.join(run_uri, CHECKPOINTS, SNAPSHOT), json.dumps(snapshot))
    storage.delete_folder(storage.join(run_uri, CHECKPOINTS, name))
    return before["checkpoint_dir_name"] if before else None
