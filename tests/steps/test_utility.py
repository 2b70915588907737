"""Whether generated images help a classifier: known answers, what is repeated, and what is refused."""

import itertools
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from do import claimed, do
from experiments import digits, tiny
from kfp import dsl
from numpy.typing import NDArray
from refused import refused

from components.tasks import utility as component
from ncsn import storage
from ncsn.config import Config, to_json
from ncsn.config.schema import UtilityConfig
from ncsn.data.format import load_manifest
from ncsn.data.samples import SampleSet
from ncsn.data.training_images import open_cache
from ncsn.evaluation import utility_training
from ncsn.evaluation.features import here
from ncsn.evaluation.utility import Comparison
from ncsn.evaluation.utility_training import ClassifierJob, Portion
from ncsn.model.checkpoint import load_checkpoint
from ncsn.progress import Progress, read_progress
from ncsn.steps import utility
from ncsn.steps.export import uncopied
from ncsn.steps.utility import Answers, train_arms

OF_CLASS = 6  # training images
Rows = NDArray[np.int64]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("digits")
    return digits(tiny(folder), folder)


@pytest.fixture(scope="module")
def asked(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Answers]:
    """Classifiers of six digits of each class and all of these images by class, of the arms that are compared."""
    folder, tests, arms = tmp_path_factory.mktemp("answers"), open_cache(dataset, "test").labels, utility._arms
    others = (utility.REAL, utility.GENERATED)

    def train(images: NDArray[np.uint8]) -> Answers:
        count = images.shape[1]
        for stored in (folder / "answers").glob("*-[0-9].npy"):
            if stored.name.startswith("ratio"):  # the others are the same each time
                stored.unlink()
        job = ClassifierJob(dataset, [count] * 10, 32, 10, False, "test", np.arange(len(tests)), f"{folder}/answers")
        labels = np.array(open_cache(dataset, "train").labels)
        labels[np.setdiff1d(np.arange(len(labels)), rows_of(dataset).flatten())] = -1
        wish = UtilityConfig(ratios=(count / OF_CLASS,), updates=100)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(utility, "RATES", (2.5e-3,))
            patch.setattr(utility, "_arms", lambda *given: [arm for arm in arms(*given) if arm.name not in others])
            made = np.concatenate([*images])
            return train_arms(job, labels, wish, made=made, runner=here, progress=Progress())

    return train


def rows_of(dataset: str, first: int = 0, count: int = OF_CLASS) -> Rows:
    """Rows of some training images of each class, [10, count]."""
    labels = open_cache(dataset, "train").labels
    return np.stack([np.flatnonzero(labels == label)[first : first + count] for label in range(10)])


def compared(found: Answers, dataset: str) -> Comparison:
    return found.compared(np.asarray(open_cache(dataset, "test").labels), num_classes=10)


def test_unseen_real_images_help(asked, dataset: str) -> None:
    found = asked(open_cache(dataset, "train").images[rows_of(dataset, OF_CLASS, 9 * OF_CLASS)])
    gain = compared(found, dataset)
    assert (gain.grade, gain.chosen) == ("helps", ["ratio-9"])


def test_images_of_other_classes_harm(asked, dataset: str) -> None:
    images = open_cache(dataset, "train").images[rows_of(dataset, OF_CLASS)].reshape(10 * OF_CLASS, 8, 8, 1)
    shuffled = images[np.random.default_rng(0).permutation(len(images))].reshape(10, OF_CLASS, 8, 8, 1)
    gain = compared(asked(shuffled), dataset)
    assert gain.grade == "harms"


@pytest.mark.slow
def test_noise_does_not_help(asked, dataset: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (10, OF_CLASS, 8, 8, 1), dtype=np.uint8)
    gain = compared(asked(noise), dataset)
    assert gain.grade != "helps"


@pytest.mark.slow
def test_copies_make_no_difference(asked, dataset: str) -> None:
    gain = compared(asked(open_cache(dataset, "train").images[rows_of(dataset)]), dataset)
    assert gain.grade == "same" and abs(gain.gain.value) < 2


CLASSES = (
    "data.num_classes=10",
    "data.max_images=300",
    "sampling.batch_size=50",
    "utility={updates: 8, ratios: [0.5]}",
)


def made(folder: Path, save_untrained, *overrides: str) -> tuple[Config, dict[str, str]]:
    """An experiment whose network knows the classes and nothing else, and its checkpoint and dataset."""
    config = tiny(folder / "store", *overrides)
    dataset = digits(config, folder / "data")
    save_untrained(config, dataset, folder / "checkpoint")
    return config, {"checkpoint": str(folder / "checkpoint"), "dataset": dataset}


def test_classifiers_read_no_generated_images_and_tell_their_updates(
    tmp_path: Path, save_untrained, monkeypatch
) -> None:
    read, reads, by_classifiers, told = SampleSet.read, [0], [0], list[int]()

    def counted(self: SampleSet, first: int, last: int) -> NDArray[np.uint8]:
        reads[0] += 1
        return read(self, first, last)

    def runner(function: Callable[..., Any], items: Any, *, gpu: bool) -> Any:
        before = reads[0]
        for item, value in here(function, items, gpu=gpu):
            told.append(value)
            yield item, value
        by_classifiers[0] += reads[0] - before

    monkeypatch.setattr(SampleSet, "read", counted)
    monkeypatch.setattr(utility_training, "_TOLD_SECONDS", -1.0)
    monkeypatch.setattr(utility, "runner_of", lambda _: runner)
    config, given = made(tmp_path, save_untrained, *CLASSES)
    folder = claimed(config, "mine")
    updates = do("utility", config, "mine", **given).updates
    assert by_classifiers[0] == 0 < reads[0]
    assert max(told) == 1 and sum(told) == len(utility.RATES) * utility.TRIED * 8 + 4 * 5 * updates
    shown = read_progress(folder.step("utility", "progress.json"))
    assert shown and (shown.done, shown.total, shown.unit) == (4 * 5 * updates, 4 * 5 * updates, "updates")


def test_a_second_call_trains_what_is_missing(tmp_path: Path, save_untrained, monkeypatch) -> None:
    config, given = made(tmp_path, save_untrained, *CLASSES)
    folder = claimed(config, "mine")
    result = do("utility", config, "mine", **given)
    manifest, rows = load_manifest(given["dataset"]), {arm.name: arm for arm in result.arms}
    real = manifest.count("train")
    wanted = sum(-(-count // 2) for count in manifest.class_counts["train"])
    assert {name: (arm.real, arm.generated) for name, arm in rows.items()} == {
        "real": (real, 0),
        "augmented": (real, 0),
        "generated": (0, wanted),
        "ratio-0.5": (real, wanted),
    }
    assert result.gain.low < result.gain.value < result.gain.high and result.grade != "helps"
    assert all(len(arm.recalls) == 10 for arm in result.arms) and len(result.classes) == 10
    assert {trial["updates"] for trial in result.trials} == {1, 2, 4, 8} and result.updates in (1, 2, 4, 8)
    assert storage.read_bytes(result.plot).startswith(b"\x89PNG") and result.sentence
    assert storage.read_json(result.uri)["gain"] == asdict(result.gain)
    assert any("utility.updates = 8" in note for note in result.notes) == (result.updates == 8)
    answers = {path: path.stat().st_mtime_ns for path in Path(folder.utility).glob("*/answers/*.npy")}
    assert len(answers) == len(utility.RATES) * utility.TRIED + 4 * 5
    assert do("utility", config, "mine", **given) == result
    outputs = {"comparison": dsl.Artifact, "pictures": dsl.HTML, "metrics": dsl.Metrics}
    artifacts = {name: kind(uri=str(tmp_path / name)) for name, kind in outputs.items()}
    inputs = {name: dsl.Artifact(metadata={"uri": uri}) for name, uri in given.items()}
    component.python_func(to_json(config), "mine", **inputs, **artifacts, task_config=dsl.TaskConfig())
    assert artifacts["comparison"].metadata["uri"] == result.uri
    assert artifacts["metrics"].metadata == {
        f"utility/gain_{name}": value for name, value in asdict(result.gain).items()
    }
    assert (tmp_path / "pictures").read_text().count("data:image/png;base64,") == 1
    lost = [path for path in answers if path.name in ("ratio-0.5-3.npy", "real-0.npy")]
    before = [path.read_bytes() for path in lost]
    for path in (*lost, Path(result.uri)):
        path.unlink()
    assert do("utility", config, "mine", **given) == result
    assert [path.read_bytes() for path in lost] == before
    assert {path for path, when in answers.items() if path.stat().st_mtime_ns != when} == set(lost)
    changed = {path: path.stat().st_mtime_ns for path in answers}
    more = config.model_copy(update={"utility": config.utility.model_copy(update={"seeds": 6})})
    assert do("utility", more, "mine", **given).seeds == 6
    assert {path: path.stat().st_mtime_ns for path in answers} == changed
    assert len([*Path(folder.utility).glob("*/answers/*.npy")]) == len(answers) + 4


def test_unbalanced_classes_are_filled_in_two_ways() -> None:
    labels = np.repeat([0, 1, -1], [9, 2, 3])
    arms = {arm.name: arm for arm in utility._arms(labels, [9, 9], [0.5])}
    shown = {name: sorted(np.concatenate([part.rows for part in arm.parts])) for name, arm in arms.items()}
    assert shown["oversampled"] == [*range(9), *[9] * 5, *[10] * 4]
    assert arms["filled"].parts[1].rows.tolist() == [*range(9, 16)]
    assert arms["filled"].images == {"real": 11, "generated": 7}


@pytest.mark.parametrize("left", [3, 0])
def test_a_model_that_copies_adds_what_else_it_makes(tmp_path: Path, save_untrained, monkeypatch, left: int) -> None:
    def some(*args: Any, **given: Any) -> Any:
        part = uncopied(*args, **given)
        return replace(part, chosen=part.chosen[:left])

    monkeypatch.setattr(utility, "uncopied", some)
    config, given = made(tmp_path, save_untrained, *CLASSES)
    claimed(config, "mine")
    result = do("utility", config, "mine", **given)
    added = {arm.name: arm.generated for arm in result.arms if arm.generated}
    assert added == ({"generated": 30, "ratio-0.5": 30} if left else {})
    assert (result.grade == "copies") == (result.gain.low == -100) == (not left)
    wanted = sum(-(-row.train // 2) for row in result.classes)
    assert (f" {wanted - 30} of {wanted} " in result.sentence) == bool(left)


def test_arms_show_what_they_share_in_the_same_order(dataset: str) -> None:
    real, made = Portion("train", np.arange(50), draw=0), Portion("generated", np.arange(20), draw=1)
    job = ClassifierJob(dataset, [20], 10, 10, False, "test", np.arange(1), "", parts=[real], seed=3)
    alone = np.concatenate([*itertools.islice(utility_training._order(job, num_train=50), 5)])
    mixed = np.concatenate(
        [*itertools.islice(utility_training._order(replace(job, parts=[real, made]), num_train=50), 7)]
    )
    assert sorted(alone) == [*range(50)] and sorted(mixed) == [*range(70)]
    np.testing.assert_array_equal(mixed[mixed < 50], alone)
    assert not np.array_equal(alone, next(utility_training._order(replace(job, seed=4, batch_size=50), num_train=50)))


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("data.max_images=100",), "data.num_classes"),
        (("data.num_classes=10", "data.max_images=20"), "utility"),  # a class has one image
    ],
)
def test_images_that_give_no_answer_are_refused(tmp_path: Path, save_untrained, overrides, key: str) -> None:
    config, given = made(tmp_path, save_untrained, *overrides)
    claimed(config, "mine")
    with refused(key):
        do("utility", config, "mine", **given)
    if key == "utility":  # before training too
        with refused("utility"):
            asking = config.model_copy(update={"utility": UtilityConfig()})
            do("train", asking, "mine", dataset=given["dataset"])


def test_weights_that_began_on_images_that_may_be_among_those_to_test_with_are_told(
    tmp_path: Path, save_untrained
) -> None:
    config, given = made(tmp_path, save_untrained, *CLASSES)
    trained, (ours, others) = load_checkpoint(given["checkpoint"]), (claimed(config, name) for name in ("a", "b"))
    began = config.model_copy(update={"train": config.train.model_copy(update={"init_from": "x"})})
    assert not utility._doubt(config, trained, ours)
    assert utility._doubt(began, trained, ours), "nobody knows"
    for folder, data in ((ours, given["dataset"]), (others, digits(tiny(tmp_path), tmp_path / "more"))):
        Path(folder.start).parent.mkdir(parents=True, exist_ok=True)
        save_untrained(config, data, Path(folder.start))
        assert bool(utility._doubt(began, trained, folder)) == (folder == others)


def test_a_model_of_other_data_is_refused(tmp_path: Path, save_untrained) -> None:
    config, given = made(tmp_path, save_untrained, *CLASSES)
    claimed(config, "mine")
    other = digits(tiny(tmp_path, "data.max_images=90"), tmp_path / "other")
    with refused("--dataset"):
        do("utility", config, "mine", checkpoint=given["checkpoint"], dataset=other)
