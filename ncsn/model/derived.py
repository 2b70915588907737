"""Checkpoints to sample from, whose weights were computed from those of others after training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ncsn import storage
from ncsn.model.index import INDEX, SAMPLING_FILES, write_index


def write_derived(
    target: str, checkpoint: str, weights: Mapping[str, Tensor], *, images_seen: int, facts: Mapping[str, Any]
) -> None:
    """Publish a checkpoint at the URI `target` with all but the weights from the one at `checkpoint`.

    Args:
        target: URI of the new checkpoint.
        checkpoint: URI of a checkpoint of the same network, whose config and moments it takes.
        weights: All parameters of the network, float32 on the CPU.
        images_seen: Training images behind the weights.
        facts: How they were computed, by a name in `state.json`.
    """
    with storage.local_copy(checkpoint) as source, storage.staged_folder(target, marker=INDEX) as folder:
        for name in ("moments.safetensors", "config.yaml"):
            (folder / name).write_bytes((source / name).read_bytes())
        known = json.loads((source / "state.json").read_text())
        kept = {name: known[name] for name in ("dataset_digest", "classes") if name in known}
        (folder / "state.json").write_text(json.dumps({**kept, "images_seen": images_seen, **facts}))
        save_file(dict(weights), folder / "ema.safetensors")
        write_index(folder, SAMPLING_FILES)
