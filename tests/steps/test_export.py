"""A data set of generated images: as many as asked for, without copies, with the same bytes again."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from do import claimed, do, recorded
from experiments import digits, tiny
from PIL import Image
from refused import refused

from ncsn import storage
from ncsn.config import Config, from_yaml, to_yaml
from ncsn.data.format import load_manifest
from ncsn.data.samples import write_shard
from ncsn.data.sources import open_source
from ncsn.data.training_images import open_cache
from ncsn.inspection.listing import describe_run
from ncsn.model.checkpoint import load_checkpoint
from ncsn.runs.run import Run
from ncsn.steps import export
from ncsn.steps.sample import samples_of
from ncsn.tracking.mlflow_runs import StepRun

CLASSES = ("data.num_classes=10", "sampling.batch_size=50")


def made(folder: Path, save_untrained, *overrides: str) -> tuple[Config, dict[str, str]]:
    """An experiment whose network knows nothing, and the URIs of its checkpoint and dataset."""
    config = tiny(folder / "store", "sampling.batch_size=6", *overrides)
    dataset = digits(config, folder / "data")
    if not (folder / "checkpoint").exists():
        save_untrained(config, dataset, folder / "checkpoint")
    return config, {"checkpoint": str(folder / "checkpoint"), "dataset": dataset}


def files(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_copies_are_left_out_and_the_next_images_take_their_places(tmp_path: Path, save_untrained) -> None:
    claimed(made(tmp_path, save_untrained)[0], "mine")
    config, given = made(tmp_path, save_untrained, "sampling.num_images=6")
    _, uri = samples_of(config, load_checkpoint(given["checkpoint"]), Run(config, "mine").folder)
    train = open_cache(given["dataset"], "train").images
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    noise[[1, 4]] = train[[3, 5]]
    write_shard(f"{uri}/shard-{0:09d}-{6:09d}.parquet", noise)
    result = do("export", config, "mine", **given)
    assert (result.counts, result.copies, result.made) == ({"": 6}, 2, 10)
    names = [f"generated-{number:06d}.png" for number in (0, 2, 3, 5, 6, 7)]
    assert files(result.uri).keys() == {"README.md", *names}
    np.testing.assert_array_equal(np.asarray(Image.open(f"{result.uri}/generated-000005.png")), noise[5, :, :, 0])
    card = Path(result.card).read_text()
    manifest = load_manifest(given["dataset"])
    assert f"| all | 6 | 10 | 2 | {manifest.count('train'):,} |" in card and manifest.digest in card
    assert "export.num_images=6" in card
    assert do("export", config, "mine", **given) == result


def test_classes_come_as_asked_and_again_with_the_same_bytes(tmp_path: Path, save_untrained, monkeypatch) -> None:
    monkeypatch.setattr("ncsn.steps.export.utc_now", lambda: "2026-01-02T03:04:05+00:00")
    asked = ("export.per_class=2", "export.classes={'7': 3}", "export.format=parquet", "sampling.seed=3")
    usual = (*CLASSES, "data.license=My <b>")
    own, given = made(tmp_path, save_untrained, *usual)
    mine = claimed(own, "mine")
    config, _ = made(tmp_path, save_untrained, *usual, *asked, f"export.out={tmp_path / 'out'}")
    first = do("export", config, "mine", **given)
    assert first.counts == {str(name): 2 + (name == 7) for name in range(10)}
    read = pq.read_table(sorted(Path(first.uri).glob("*.parquet")))
    assert np.bincount(read.column("label")).tolist() == list(first.counts.values())
    card = Path(first.card).read_text()
    assert "| date | 2026-01-02 |" in card and "terms: My &lt;b>" in card
    command = shlex.split(card.partition("```bash\n")[2].partition("\n```")[0])
    assert command[:5] == ["ncsn", "export", mine.uri, "--checkpoint", given["checkpoint"]]
    assert set(command[5::2]) == {"--set"}
    other, _ = made(tmp_path, save_untrained, *usual, *command[6::2])
    storage.delete(mine.samples)
    assert files(do("export", other, "mine", **given).uri) == files(first.uri)
    owned, _ = made(tmp_path, save_untrained, *CLASSES, "data.owner=Ada", *command[6::2])
    assert "owner: Ada" in Path(do("export", owned, "mine", **given).card).read_text()
    source = ["data.source=parquet", f"data.root={first.uri}", "data.test_fraction=0.2"]
    back = open_source(tiny(tmp_path, *source).data)
    assert back.class_names == tuple(map(str, range(10))) and sum(map(len, back.splits.values())) == 21


def test_the_command_of_a_card_runs_as_it_is_printed(tmp_path: Path, save_untrained, monkeypatch) -> None:
    """In an empty folder, for a run in the store that commands take by default."""
    monkeypatch.chdir(tmp_path)
    config, given = made(tmp_path, save_untrained, *CLASSES, "export.classes={'3': 2}", "storage.root=.ncsn")
    do("ingest", config, "mine")
    result = do("export", config, "mine", checkpoint=given["checkpoint"])
    script = Path(result.card).read_text().partition("```bash\n")[2].partition("```")[0]
    (empty := tmp_path / "empty").mkdir()
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], cwd=empty, env=env, capture_output=True, text=True, check=False)
    assert f"uri: {result.uri}\n" in done.stdout, done.stderr
    assert list(empty.iterdir()) == []


def test_fill_completes_each_class_to_the_largest(tmp_path: Path, save_untrained) -> None:
    config, given = made(tmp_path, save_untrained, *CLASSES, "export.fill=true", "data.max_images=60")
    counts = load_manifest(given["dataset"]).class_counts["train"]
    missing = {str(name): max(counts) - count for name, count in enumerate(counts) if count < max(counts)}
    folder = claimed(config, "mine")  # as of a version
    recorded(folder, "train", key={"model": "models:/mine/1"}, result={})
    recorded(folder, "register", result={"utility": "They help"})
    result = do("export", config, "mine", **given)
    other, _ = made(tmp_path, save_untrained, *CLASSES, "export.fill=true", "data.max_images=60", "sampling.seed=5")
    noisier = from_yaml(to_yaml(other), overrides=["sampling.sampler.steps_per_level=2"])
    cards = [Path(do("export", each, "mine", **given).card).read_text() for each in (other, noisier)]
    assert ["They help" in card for card in cards] == [True, False], "it was asked about images of the first kind"
    assert result.counts == missing
    names = json.loads(Path(result.uri, "classes.json").read_text())
    folders = {name: Path(result.uri, folder) for folder, name in names.items()}  # of all, also those without images
    assert {name: len(list(folder.iterdir())) for name, folder in folders.items() if folder.exists()} == missing
    assert len(names) == len(counts) > len(missing)


@pytest.mark.parametrize(
    ("key", "overrides"),
    [
        ("export.per_class", ["export.per_class=3"]),
        ("export.fill", ["export.fill=true"]),
        ("export", CLASSES),
        ("export.num_images", [*CLASSES, "export.num_images=3"]),
        ("export.classes", [*CLASSES, "export.classes={eleven: 3}"]),
        ("export.out", ["export.num_images=3", "export.out=/"]),
        ("export.out", ["export.num_images=3", "export.out=/proc/none/here"]),
        ("export.out", ["export.num_images=3", "export.out=/proc/none"]),
        ("export.out", ["export.num_images=3", f"export.out={__file__}/here"]),
        ("--dataset", ["export.num_images=3", "data.max_images=99"]),
    ],
)
def test_what_cannot_be_exported_is_named(tmp_path, save_untrained, monkeypatch, key, overrides: list[str]) -> None:
    config, given = made(tmp_path, save_untrained, *overrides)
    if key == "--dataset":
        given["dataset"] = digits(tiny(tmp_path / "store"), tmp_path / "others")
    monkeypatch.setattr(export, "uncopied", None)  # before anything is made
    with refused(key):
        do("export", config, "mine", **given)


@pytest.mark.parametrize("out", [(), ("export.out={0}/out",)], ids=["of the run", "named"])
def test_an_export_that_was_stopped_once_it_was_published_ends_the_next_time(
    tmp_path: Path, save_untrained, monkeypatch: pytest.MonkeyPatch, out: tuple[str, ...]
) -> None:
    def asked(count: int) -> tuple[Config, dict[str, str]]:
        return made(tmp_path, save_untrained, f"export.num_images={count}", *(each.format(tmp_path) for each in out))

    def stop(*_: object, **__: object) -> None:
        raise SystemExit(143)

    config, given = asked(3)
    with monkeypatch.context() as stopped:
        stopped.setattr(StepRun, "log_dataset", stop)
        with pytest.raises(SystemExit):
            do("export", config, "mine", **given)
    (card,) = tmp_path.rglob("README.md")
    with monkeypatch.context() as known:
        known.setattr(export, "uncopied", None)
        result = do("export", config, "mine", **given)
    assert (result.uri, result.card, result.counts, result.made) == (str(card.parent), str(card), {"": 3}, 3)
    if out:
        with refused("export.out"):
            do("export", asked(2)[0], "mine", **given)
        assert describe_run(config.storage.root, "mine").figures == str(result)
        do("export", made(tmp_path, save_untrained, "export.num_images=2")[0], "mine", **given)
    monkeypatch.setattr(export, "uncopied", None)
    assert do("export", config, "mine", **given) == result, "whatever came in between"
    card.write_text("a page that somebody wrote")
    assert do("export", config, "mine", **given) == result
    card.write_text(f"<!-- ncsn export {'0' * 12} {{ -->")
    assert export.published(result.uri, "0" * 12) is None


def test_a_model_that_copies_gives_no_data_set(tmp_path: Path, save_untrained) -> None:
    config, given = made(tmp_path, save_untrained, "export.num_images=5")
    _, uri = samples_of(config, load_checkpoint(given["checkpoint"]), Run(config, "mine").folder)
    train = open_cache(given["dataset"], "train").images
    write_shard(f"{uri}/shard-{0:09d}-{20:09d}.parquet", np.ascontiguousarray(train[:20]))
    with refused("export"):
        do("export", config, "mine", **given)
    assert not list(Path(config.storage.root, "runs", "mine", "exports").glob("*"))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_parquet_holds_what_has_no_classes_or_no_place_in_png(tmp_path: Path, save_untrained, dtype: str) -> None:
    (tmp_path / "pictures").mkdir()
    for number, image in enumerate(np.random.default_rng(0).integers(0, 256, (30, 8, 8)).astype(dtype)):
        Image.fromarray(image).save(tmp_path / "pictures" / f"{number}.png")
    asked = ("data.source=image_folder", f"data.root={tmp_path / 'pictures'}", f"data.dtype={dtype}")
    config, given = made(tmp_path, save_untrained, *asked, "export.num_images=3")
    if dtype == "uint16":
        with refused("export.format"):
            do("export", config, "mine", **given)
    config, _ = made(tmp_path, save_untrained, *asked, "export.num_images=3", "export.format=parquet")
    result = do("export", config, "mine", **given)
    back = open_source(tiny(tmp_path, "data.source=parquet", f"data.root={result.uri}", f"data.dtype={dtype}").data)
    assert sum(map(len, back.splits.values())) == 3 and back.class_names == ()
