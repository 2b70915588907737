"""A worker that hangs leaves its stacks and ends; one that is slow, or waits for a slow one, goes on."""

from __future__ import annotations

import faulthandler
import time

import pytest
import torch.multiprocessing
from workers import hang

from ncsn.config import from_yaml
from ncsn.data.training_images import CachedSplit
from ncsn.model.checkpoint import CheckpointStore
from ncsn.training import context as training_context, loop
from ncsn.training.context import WorkerContext
from ncsn.training.loop import TrainingJob, train_loop


@pytest.mark.parametrize(
    ("each", "longest", "fetching", "guarded", "ends"),
    [
        pytest.param(0.0, 20.0, False, True, True, id="hangs"),
        pytest.param(0.1, 0.4, False, True, False, id="slow"),
        pytest.param(0.0, 0.8, True, True, False, id="waits for the store"),
        pytest.param(0.0, 0.8, False, False, False, id="in a notebook"),
    ],
)
def test_a_worker_that_hangs_ends(tiny, dataset, tmp_path, monkeypatch, each, longest, fetching, guarded, ends):
    """A step may take 0.2 s in any case. Each draw takes some time, and the fourth longer, until the process ends."""
    orders, draws, draw_batch, stacks = [], [], loop.draw_batch, tmp_path / "hung" / "worker-0.txt"

    def slow_draw(*args, first, **given):
        draws.append(first)
        until = time.monotonic() + (longest if first == 48 else each)
        while time.monotonic() < until and not stacks.exists():
            time.sleep(0.01)
        return draw_batch(*args, first=first, **given)

    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda _, **order: orders.append(order))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: orders.append("canceled"))
    monkeypatch.setattr(training_context, "STEP_SECONDS", 0.2)
    monkeypatch.setattr(training_context, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(loop, "draw_batch", slow_draw)
    monkeypatch.setattr(loop, "CHECK_SECONDS", 0.0)  # steps are looked at one by one, as where they are slow
    monkeypatch.setattr(CachedSplit, "fetching", fetching)
    context, job = WorkerContext(), TrainingJob(config=from_yaml(tiny), dataset=dataset)
    context.hung = str(stacks.parent) if guarded else None
    train_loop(job, context, CheckpointStore(str(tmp_path / "checkpoints")))
    assert draws == list(range(0, 160, 16))
    # Here it goes on after all, and the process may get other work.
    assert orders == ([{"exit": True, "file": 2}, "canceled"] if ends else [])
    assert stacks.exists() == ends and (not ends or "in slow_draw" in stacks.read_text())


@pytest.mark.slow
def test_one_of_four_hangs_after_another_was_long_at_a_checkpoint(tiny, dataset, tmp_path):
    """All of them end soon, and their stacks say which one hangs."""
    job = TrainingJob(config=from_yaml(tiny, overrides=["train.checkpoint_every_images=32"]), dataset=dataset)
    workers = torch.multiprocessing.spawn(hang, (4, job, str(tmp_path)), nprocs=4, join=False).processes
    for worker in workers:
        worker.join(60)
        worker.kill()
    assert [worker.exitcode for worker in workers] == [1] * 4
    assert list(CheckpointStore(str(tmp_path / "checkpoints")).names())[-1] == "images-000000032"
    stacks = [(tmp_path / "hung" / f"worker-{rank}.txt").read_text() for rank in range(4)]
    assert ["time.sleep(600)" in stack for stack in stacks] == [False, False, True, False]
