"""Which config, run and inputs the options name."""

from __future__ import annotations

import shutil
from pathlib import Path

from do import claimed, recorded
from refused import refused

from ncsn import storage
from ncsn.cli.target import TargetOptions
from ncsn.errors import ConfigError, NotFound
from ncsn.runs.run import find_inputs


def test_the_run_name_depends_on_what_decides_the_weights(config_file: Path) -> None:
    run = TargetOptions(str(config_file)).resolve().name
    assert run.startswith("tiny-")
    goes_on = "train.num_images=320"
    for override in ("seed=0", goes_on, "sampling.num_images=9", "compute.num_workers=2", "storage.root=/elsewhere"):
        assert TargetOptions(str(config_file), (override,)).resolve().name == run
    for override in ("optimizer.decay=cosine", "seed=1", "data.max_images=32"):
        assert TargetOptions(str(config_file), (override,)).resolve().name != run


def test_a_run_is_where_its_store_is_now(config_file: Path, store: Path, tmp_path: Path) -> None:
    recorded(claimed(TargetOptions(str(config_file)).resolve().config, "mine"), "ingest", state="RUNNING")
    moved = store.rename(tmp_path / "moved")
    checkpoint = moved / "runs/mine/checkpoints/images-000000160"
    storage.write_text(str(checkpoint / "checkpoint.json"), "{}")
    for found in (
        TargetOptions(str(moved / "runs/mine/config.yaml"), run="mine").resolve(),
        TargetOptions(None, (f"storage.root={moved}",), "mine").resolve(),
        TargetOptions().resolve(str(checkpoint)),
        TargetOptions(None, (f"storage.root={moved}",)).resolve("mine"),
    ):
        assert (found.config.storage.root, found.name) == (str(moved), "mine")
    changed = TargetOptions(None, (f"storage.root={moved}", "sampling.num_images=9"), "mine").resolve()
    assert changed.config.sampling.num_images == 9
    elsewhere = TargetOptions(str(moved / "runs/mine/config.yaml"), ("storage.root=/elsewhere",))
    assert elsewhere.resolve().config.storage.root == "/elsewhere"
    (tmp_path / "runs/stripped").mkdir(parents=True)
    stripped = shutil.copy(moved / "runs/mine/config.yaml", tmp_path / "runs/stripped")
    assert TargetOptions(str(stripped)).resolve().config.storage.root == str(tmp_path), (
        "without its steps, a record too"
    )


def test_a_checkpoint_brings_its_config_and_its_run(config_file: Path, store: Path, tmp_path: Path) -> None:
    own = TargetOptions(str(config_file)).resolve()
    claimed(own.config, "mine")
    for folder, run in (
        (store / "runs/mine/checkpoints", "mine"),
        (store / "runs/mine/selected", "mine"),
        (store / "runs/mine/search/trials/a/b/checkpoints", own.name),
        (tmp_path / "a/checkpoints", own.name),
    ):
        checkpoint = folder / "images-000000160"
        storage.write_text(str(checkpoint / "config.yaml"), config_file.read_text())
        storage.write_text(str(checkpoint / "checkpoint.json"), "{}")
        found = TargetOptions().resolve(str(checkpoint))
        assert (found.name, found.config.name, found.checkpoint) == (run, "tiny", str(checkpoint))


def test_a_name_is_a_config_here_or_else_an_example(config_file: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert TargetOptions("digits").resolve().config.name == "digits"
    (tmp_path / "digits").mkdir()
    with refused("digits", error=ConfigError):  # a folder is not taken for the example
        TargetOptions("digits").resolve()
    (tmp_path / "digits.yaml").write_bytes(config_file.read_bytes())
    assert TargetOptions("digits").resolve().config.name == "tiny"


def test_a_config_that_is_not_there(config_file: Path, store: Path, tmp_path: Path) -> None:
    with refused("--config"):
        TargetOptions().resolve()
    for both in (TargetOptions(str(config_file)), TargetOptions(run="mine")):
        with refused("ADDRESS"):
            both.resolve("mine")
    with refused("--run", error=NotFound):
        TargetOptions(None, (f"storage.root={store}",), "gone").resolve()
    with refused("--set"):
        TargetOptions(None, ("trackin.uri=x",)).registry  # noqa: B018
    (tmp_path / "image.yaml").write_bytes(b"\x89PNG\xff")
    for name, error in (("absent.yaml", NotFound), ("", ConfigError), ("image.yaml", ConfigError)):
        with refused(str(tmp_path / name), error=error):
            TargetOptions(str(tmp_path / name)).resolve()


def test_inputs_are_the_given_ones_else_those_of_the_run(config_file: Path) -> None:
    """Sampled is the checkpoint that select chose, until the run is trained again."""
    config = TargetOptions(str(config_file)).resolve().config
    folder = claimed(config, "mine")

    def finish(step: str, *, at: str = "2026-01-01", **result: str) -> None:
        recorded(folder, step, state="FINISHED", result=result, finished_at=at)

    finish("ingest", uri="/data/set")
    finish("sample", uri="/samples", checkpoint="/selected")
    assert find_inputs(folder, "register", {"evaluation": "/e"})["checkpoint"] == "/selected"
    found = find_inputs(folder, "evaluate", {"samples": "/other/", "dataset": None})
    assert found == {"samples": "/other", "dataset": "/data/set"}
    with refused("--checkpoint"):
        find_inputs(folder, "sample", {"checkpoint": None})

    def sampled(**given: str) -> str:
        return find_inputs(folder, "sample", given)["checkpoint"]

    last, best = (storage.join(folder.uri, place) for place in ("checkpoints/images-9", "selected/images-5"))
    finish("train", checkpoint=last)
    assert sampled() == last
    finish("select", checkpoint=best, at="2026-01-02")
    assert sampled() == last, "the copy is gone"
    storage.write_text(best, "x")
    assert (sampled(), sampled(checkpoint=last)) == (best, last)
    finish("train", checkpoint=last, at="2026-01-03")
    assert sampled() == last
