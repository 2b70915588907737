"""A user's mistake inside a step comes out of `ncsn run` as one line and exit code 2."""

from __future__ import annotations

import json

import pytest

DIVERGE = (
    "optimizer.learning_rate=1",
    "optimizer.beta_2=0",
    "optimizer.eps=1e-30",
    "train.report_every_images=32",
    "compute.num_workers=1",
)


@pytest.mark.parametrize(
    ("run", "settings", "step", "subject"),
    [
        ("nowhere", ("data.source=image_folder", "data.root=/no/such/folder"), "ingest", "/no/such/folder"),
        pytest.param(
            "diverged", DIVERGE, "train", "step train: optimizer.learning_rate = 1.0: ", marks=pytest.mark.slow
        ),
    ],
)
def test_one_line_through_the_whole_stack(
    workplace, run: str, settings: tuple[str, ...], step: str, subject: str
) -> None:
    done = workplace.run("run", "--run", run, *(part for setting in settings for part in ("--set", setting)))
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: step {step}: ")
    assert subject in errors[0]
    assert f"{workplace.folder(run)}/log.txt" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not json.loads((workplace.folder(run) / "steps" / step / "step.json").read_text())["result"]
    workplace.wait_for_silence()
