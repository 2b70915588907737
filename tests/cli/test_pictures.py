"""`ncsn figures` and `ncsn toy` as commands: what they say when they cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from ncsn.cli import app


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nfe", "10,few"], "error: --nfe '10,few': expected whole numbers with commas between, such as 10,20,50\n"),
        ([], "figures needs the checkpoint, and run 'mine' has none yet; run `ncsn train` with the same options first"),
    ],
)
def test_figures_says_what_is_missing_or_wrong(config_file: Path, arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["figures", "--config", str(config_file), "--run", "mine", *arguments])
    assert done.exit_code == 2
    assert message in done.output
    assert done.output.count("\n") == 1


def test_a_seed_of_the_toy_is_a_number() -> None:
    done = CliRunner().invoke(app, ["toy", "--seed", "-1"])
    assert done.exit_code == 2
    assert "-1 is not in the range" in done.output
