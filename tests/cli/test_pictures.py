"""`ncsn figures` and `ncsn toy` as commands: what they say when they cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from ncsn.cli import app


@pytest.mark.parametrize(("arguments", "subject"), [(["--nfe", "10,few"], "--nfe '10,few'"), ([], "--checkpoint")])
def test_figures_says_what_is_missing_or_wrong(config_file: Path, arguments: list[str], subject: str) -> None:
    done = CliRunner().invoke(app, ["figures", "--config", str(config_file), "--run", "mine", *arguments])
    assert done.exit_code == 2
    assert done.output.startswith(f"error: {subject}: ")
    assert done.output.count("\n") == 1


def test_a_seed_of_the_toy_is_a_number() -> None:
    done = CliRunner().invoke(app, ["toy", "--seed", "-1"])
    assert done.exit_code == 2
    assert "--seed" in done.output
