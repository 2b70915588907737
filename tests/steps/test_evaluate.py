"""The evaluate step on real digits: real images score as real, copies and few modes do not; nothing is done twice."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from do import do
from experiments import digits, tiny
from refused import refused

from ncsn.config import Config
from ncsn.data.dataset import write_dataset
from ncsn.data.format import Rows, to_table
from ncsn.data.sources import open_source
from ncsn.data.training_images import open_cache
from ncsn.errors import NotFound
from ncsn.evaluation.copies import Copies
from ncsn.evaluation.frechet import RunningScore
from ncsn.progress import Progress
from ncsn.report.words import score_rows
from ncsn.runs.metrics import with_interval
from ncsn.steps import evaluate as step
from ncsn.tracking.client import connect
from ncsn.tracking.gate import Measurement

KNOWN = "data.num_classes=10"


def make_config(root: Path, *overrides: str) -> Config:
    return tiny(root, "sampling.num_images=500", "evaluation={}", *overrides)


@pytest.fixture(scope="module")
def dataset(root: Path) -> str:
    return digits(make_config(root), root / "datasets" / "digits")


def write_samples(folder: Path, images: np.ndarray, labels: np.ndarray | None = None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    rows = Rows(np.ascontiguousarray(images), np.full(len(images), -1) if labels is None else labels)
    pq.write_table(to_table(rows), folder / f"shard-{0:09d}-{len(images):09d}.parquet")
    return str(folder)


def evaluate(config: Config, *, samples: str, dataset: str, folder: Path) -> step.EvaluateResult:
    return step.evaluate(config, samples=samples, dataset=dataset, folder=str(folder), progress=Progress())


def test_real_images_as_samples_reach_the_real_figures(root: Path, dataset: str) -> None:
    config, test = make_config(root), open_cache(dataset, "test").images
    samples = write_samples(root / "real", test[:500])
    result = do("evaluate", config, "real", samples=samples, dataset=dataset)
    of_real = {name.removeprefix("eval/real_classifier_"): value for name, value in result.real_metrics.items()}
    found = {name.removeprefix("eval/classifier_"): value for name, value in result.metrics.items()}
    assert found["test_accuracy"] >= 0.97 and found["score_n500"] > 8 and found["confidence_n500"] > 0.95
    assert found["fid_n500"] == pytest.approx(of_real["fid_n500"], rel=0.1)
    width = found["kid_high_n500"] - found["kid_low_n500"]
    assert found["kid_n500"] == pytest.approx(of_real[f"kid_n{len(test)}"], abs=width)
    assert found["score_n500"] == pytest.approx(of_real["score_n500"], rel=0.06) and found["class_tv_n500"] < 0.06
    assert min(found[f"{share}_n500"] for share in ("precision", "recall", "coverage")) > 0.8
    assert found["density_n500"] == pytest.approx(1, abs=0.2) and found["copies_n500"] < 0.05
    assert found["excess_low_n500"] < 0 < found["excess_high_n500"] < 0.1
    assert (result.num_images, result.num_real_images, result.classes, len(result.notes)) == (500, len(test), None, 1)
    assert [score["num_images"] for score in result.running] == [256, 500]  # twice the features, and all
    last = RunningScore(**result.running[-1])
    assert 0 < found["fid_low_n500"] < last.fid == found["fid_n500"] < found["fid_high_n500"]
    progress = json.loads((root / "runs" / "real" / "steps" / "evaluate" / "progress.json").read_text())
    assert progress["text"] == str(last)
    assert result.grade in ("close", "unsure") and with_interval(*last.values.values()) in result.verdict
    assert Path(result.real_images).read_bytes().startswith(b"\x89PNG")
    measured = Measurement("eval/classifier_fid_n500", found["fid_n500"], last.log_std, 500, result.fingerprint)
    assert Measurement(**result.gate) == measured and not Copies(**result.audit["copies"]).more_than_chance
    written = json.loads(Path(result.uri).read_text())
    assert (written["metrics"], written["audit"], written["reference_split"]) == (result.metrics, result.audit, "train")
    assert Path(result.uri).parent == root / "runs" / "real" / "evaluation"
    at = Path(result.uri).stat().st_mtime_ns
    assert do("evaluate", config, "real", samples=samples, dataset=dataset) == result
    assert Path(result.uri).stat().st_mtime_ns == at, "nothing is measured again"


def test_copies_of_training_images_are_flagged(root: Path, dataset: str, tmp_path: Path) -> None:
    images = open_cache(dataset, "train").images[:500].copy()
    images[::2] = images[::2, :, ::-1]
    copies = write_samples(tmp_path / "copies", images)
    config = make_config(root, "data.horizontal_flip=true")
    result = evaluate(config, samples=copies, dataset=dataset, folder=tmp_path)
    assert result.metrics["eval/classifier_copies_n500"] == result.metrics["eval/classifier_closeness_n500"] == 1
    assert Copies(**result.audit["copies"]).more_than_chance and result.grade == "copied"
    assert result.real_metrics["eval/real_classifier_copies_n500"] < 0.01
    assert [pair["row"] for pair in result.audit["worst"]] == [pair["image"] for pair in result.audit["worst"]]
    assert len(result.audit["worst"]) == 16 and result.audit["worst"][-1]["statistic"] < 0.01


def unlabeled(config: Config, *, train: int = 9999, test: int = 9999) -> str:
    """A dataset of at most so many digits of each split, without their labels."""
    source, root = open_source(config.data), f"{config.storage.root}/datasets"
    parts = {"train": source.splits["train"].section(0, train), "test": source.splits["test"].section(0, test)}
    splits = {name: replace(part, labels=np.full(len(part), -1)) for name, part in parts.items()}
    return write_dataset(replace(source, class_names=(), splits=splits), root, name="unlabeled", data=config.data).uri


def test_images_without_labels_are_measured_by_clusters(root: Path, tmp_path: Path) -> None:
    config = make_config(root)
    dataset, test = unlabeled(config), open_source(config.data).splits["test"]
    real = write_samples(tmp_path / "real", open_cache(dataset, "test").images[:500])
    threes = test.images[test.labels == 3]
    one_mode = write_samples(tmp_path / "threes", np.tile(threes, (11, 1, 1, 1))[:500])
    good, poor = (evaluate(config, samples=each, dataset=dataset, folder=tmp_path) for each in (real, one_mode))
    distance = good.metrics["eval/clusters_fid_n500"]
    assert distance == pytest.approx(good.real_metrics["eval/real_clusters_fid_n500"], rel=0.1)
    assert poor.metrics["eval/clusters_fid_n500"] > 10 * distance
    assert poor.metrics["eval/clusters_coverage_n500"] < 0.5 < good.metrics["eval/clusters_coverage_n500"]
    assert not [name for name in good.metrics if "score" in name or "class" in name or "confidence" in name]
    assert good.gate["name"] == "eval/clusters_fid_n500" and len(good.notes) == 2


def test_few_images_without_labels_are_enough(root: Path, tmp_path: Path) -> None:
    """They have no score, and so no splits, whose number `evaluation.num_splits` gives."""
    config = make_config(root, "sampling.num_images=20")
    dataset = unlabeled(config, train=30, test=3)
    samples = write_samples(tmp_path / "few", open_cache(dataset, "train").images[:20])
    result = evaluate(config, samples=samples, dataset=dataset, folder=tmp_path)
    assert all(np.isfinite(value) for value in (result.metrics | result.real_metrics).values())
    assert (result.num_images, result.num_real_images) == (20, 3)


def test_fewer_test_images_than_samples_is_said(root: Path, dataset: str, tmp_path: Path) -> None:
    train = open_cache(dataset, "train").images[:600]
    config = make_config(root, "sampling.num_images=600")
    result = evaluate(config, samples=write_samples(tmp_path / "many", train), dataset=dataset, folder=tmp_path)
    count = len(open_cache(dataset, "test").images)
    assert (result.num_images, result.num_real_images) == (600, count)
    assert f"eval/real_classifier_fid_n{count}" in result.real_metrics
    assert str(count) in result.notes[0]
    assert f" {count} each" in result.verdict, "a distance depends on the number of images"
    numbers = {name.rpartition("_n")[2] for name in result.metrics if re.search("_(fid|score|class_tv)", name)}
    assert numbers == {"600", str(count)}, "the gate's of all samples, and those beside real images"
    of_equal = result.metrics[f"eval/classifier_fid_n{count}"]
    shown = {row.metric: row for row in score_rows(asdict(result))}
    assert (shown["fid"].value, result.gate["value"]) == (of_equal, result.metrics["eval/classifier_fid_n600"])
    assert shown["fid"].text in result.verdict and shown["fid"].text in str(result)


def test_images_are_judged_by_the_classes_that_they_were_asked_for(root: Path, dataset: str) -> None:
    config, test = make_config(root, KNOWN), open_cache(dataset, "test")
    labels = np.array(test.labels[:500])
    labels[:50] = (labels[:50] + 1) % 10
    samples = write_samples(root / "asked", test.images[:500], labels)
    result = do("evaluate", config, "asked", samples=samples, dataset=dataset)
    accuracy = result.metrics["eval/classifier_test_accuracy"]
    agreement = result.metrics["eval/classifier_class_agreement_n500"]
    assert agreement == pytest.approx(0.9 * accuracy, abs=0.02)
    real = {name.rpartition("_n")[0]: value for name, value in result.real_metrics.items()}
    assert real["eval/real_classifier_class_agreement"] == pytest.approx(accuracy, abs=0.02)
    assert result.metrics["eval/classifier_class_kid_n500"] > real["eval/real_classifier_class_kid"]
    found = result.classes
    assert found is not None and found["agreement"] == agreement and not found["by_probe"]
    counts, confusion = [line["num_images"] for line in found["table"]], np.array(found["confusion"])
    assert counts == np.bincount(labels, minlength=10).tolist()
    assert confusion.sum() == 500 and np.trace(confusion) == round(500 * agreement)
    assert json.loads(Path(result.uri).read_text())["classes"] == found
    connection = connect(config)
    of_result = f"tags.`evaluation.uri` = '{result.uri}' and tags.`ncsn.step` = 'evaluate'"
    (run,) = connection.client.search_runs([connection.experiment_id], of_result)
    assert run.data.metrics[f"eval/classifier_class_agreement_n{counts[3]}/3-3"] == found["table"][3]["agreement"]
    pictures = {Path(uri).name for uri in (result.neighbors, result.confusion)}
    assert pictures <= {file.path for file in connection.client.list_artifacts(run.info.run_id)}


def test_classes_are_compared_with_the_images_of_the_reference(root: Path, dataset: str, tmp_path: Path) -> None:
    test, threes, found = open_cache(dataset, "test"), {}, {}
    samples = write_samples(tmp_path / "asked", test.images[:500], test.labels[:500])
    for split in ("train", "test"):
        config = make_config(root, KNOWN, f"evaluation.reference_split={split}")
        result = evaluate(config, samples=samples, dataset=dataset, folder=tmp_path)
        assert result.classes is not None and not result.classes["by_probe"]
        assert (result.classes["real_agreement"] is None) == (split == "test"), "the classifier has seen them"
        threes[split], found[split] = result.classes["table"][3], result
    assert threes["test"]["agreement"] == threes["train"]["agreement"] > 0.9
    assert threes["test"]["kid"] < threes["train"]["kid"], "they are the test images"
    train, against = found["train"], found["test"]
    assert against.metrics["eval/classifier_vs_test_fid_n500"] < train.metrics["eval/classifier_fid_n500"]
    assert "eval/real_classifier_vs_test_fid_n500" in against.real_metrics
    assert against.fingerprint != train.fingerprint and against.uri != train.uri
    assert against.audit == train.audit, "not of the real images then"
    assert [each["label"] for each in train.audit["classes"]] == list(range(10))


def test_samples_that_are_missing_or_of_another_size_or_other_classes_are_refused(root, dataset, tmp_path) -> None:
    images, names = open_cache(dataset, "test").images[:500], ["zero", *map(str, range(1, 10))]
    large = write_samples(tmp_path / "large", np.zeros((500, 28, 28, 1), np.uint8))
    others = write_samples(tmp_path / "others", images, np.arange(500) % 9)
    with refused(large) as caught:
        evaluate(make_config(root), samples=large, dataset=dataset, folder=tmp_path / "out")
    assert "28 x 28 x 1" in str(caught.value) and "8 x 8 x 1" in str(caught.value)
    with refused(f"{tmp_path}/nowhere", error=NotFound):
        do("evaluate", make_config(root), "bad", samples=f"{tmp_path}/nowhere", dataset=dataset)
    with refused(str(tmp_path), error=NotFound):
        do("evaluate", make_config(root), "bad", samples=large, dataset=str(tmp_path))
    with refused("data.num_classes"):
        evaluate(make_config(root, "data.num_classes=9"), samples=others, dataset=dataset, folder=tmp_path / "out")
    Path(others, "manifest.json").write_text(json.dumps({"classes": names}))
    with refused("data.num_classes") as caught:
        evaluate(make_config(root, KNOWN), samples=others, dataset=dataset, folder=tmp_path / "out")
    assert "'zero'" in str(caught.value) and not (tmp_path / "out").exists()


def test_images_class_by_class_have_the_figures_of_mixed_ones(root: Path, dataset: str, tmp_path: Path) -> None:
    test = open_cache(dataset, "test")
    labels = np.asarray(test.labels)[:500]
    order = np.argsort(labels, kind="stable")
    figures = []
    for name, rows, label in (("mixed", slice(None), "balanced"), ("sorted", order, np.bincount(labels).tolist())):
        asked = label if label == "balanced" else json.dumps(dict(enumerate(label)))
        config = make_config(root, KNOWN, f"sampling.label={asked}", f"sampling.num_images={len(labels)}")
        samples = write_samples(tmp_path / name, test.images[:500][rows], labels[rows])
        figures.append(evaluate(config, samples=samples, dataset=dataset, folder=tmp_path / name).metrics)
    mixed, ordered = figures
    for name in ("recall", "class_agreement"):
        (key,) = (each for each in mixed if f"_{name}_n" in each)
        assert ordered[key] == pytest.approx(mixed[key], abs=0.15)
