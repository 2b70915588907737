"""A user's mistake inside a step comes out of `ncsn run` as one line and exit code 2."""

from __future__ import annotations

import json


def test_one_line_through_the_whole_stack(workplace) -> None:
    run, step, subject = "nowhere", "ingest", "/no/such/folder"
    done = workplace.run("run", "--run", run, "--set", "data.source=image_folder", "--set", f"data.root={subject}")
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
