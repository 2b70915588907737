"""A config survives its text, mistakes are refused by their keys, and shipped configs are as in the papers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from refused import refused

from ncsn.config import Config, ConfigError, changed_settings, from_yaml, overrides_between, to_json, to_yaml
from ncsn.config.problems import fields_of, section_models
from ncsn.data.pixels import Fit
from ncsn.evaluation import evaluation_of
from ncsn.model import build
from ncsn.model.generate import evaluations_per_image
from ncsn.steps.train import require_classes

CONFIGS = Path(__file__).parents[2] / "configs"
DIGITS = (CONFIGS / "digits.yaml").read_text()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_config_is_named_after_its_file_and_survives_its_text(path: Path) -> None:
    config = from_yaml(path.read_text())
    assert config.name.replace("-", "_") == path.stem
    assert from_yaml(to_json(config)) == from_yaml(to_yaml(config)) == config


def shipped(name: str) -> Config:
    return from_yaml((CONFIGS / f"{name}.yaml").read_text())


@pytest.mark.parametrize(
    ("name", "parameters", "nfe"),
    [
        ("mnist", 7_638_657, 1000),
        ("cifar10_ncsn", 30_117_635, 1000),
    ],
)
def test_networks_chains_and_steps_are_the_papers(name: str, parameters: int, nfe: int) -> None:
    config = shipped(name)
    sampler = config.sampling.sampler
    assert (sampler.kind, sampler.epsilon) == ("annealed_langevin", 2e-5)
    assert sum(parameter.numel() for parameter in build.network(config).parameters()) == parameters
    assert evaluations_per_image(config) == nfe


@pytest.mark.parametrize("name", ["digits", "fashion", "cifar10"])
def test_a_two_step_recipe_tunes_the_network_of_the_run_that_it_names(name: str) -> None:
    config = shipped(f"{name}_two_step")
    teacher = shipped(str(config.train.init_from).replace("-", "_"))
    assert config.network.model_copy(update={"dropout": 0.0}) == teacher.network.model_copy(update={"dropout": 0.0})
    assert config.data == teacher.data.model_copy(update={"augmentation": None})
    assert (config.noise.sigma_1, config.evaluation) == (teacher.noise.sigma_1, teacher.evaluation)
    assert config.loss.kind == "consistency" and evaluations_per_image(config) == 2
    if teacher.sampling.guidance is not None:
        assert getattr(config.loss, "guidance", None) == teacher.sampling.guidance
    # -1.1 and 2 for pixels in [-1, 1] whose deviation is 0.5, there as here.
    training = config.noise.training
    assert training.kind == "lognormal"
    unit = getattr(config.network, "sigma_data", 0) / 0.5
    assert training.mean == pytest.approx(math.log(unit) - 1.1, abs=0.01) and training.std == 2.0


def test_a_misspelled_key_is_told_its_neighbor_and_a_wrong_value_itself() -> None:
    with refused("noise.num_level", "optimizer.learning_rate") as caught:
        from_yaml(DIGITS, overrides=["noise.num_level=3", "optimizer.learning_rate=-1"], origin="digits.yaml")
    unknown, wrong = caught.value.problems
    assert "'num_levels'" in unknown.hint and "sigma_1" in unknown.hint
    assert wrong.value == -1
    assert {unknown.origin, wrong.origin} == {"--set"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- 1",
        "a: [",
        "[1, 2]: 3\n",
        DIGITS + "name: again\n",
        "name: !!python/object/apply:os.system ['true']",
        "name: 2020-13-45",
        "name: !!timestamp x",
    ],
)
def test_a_text_that_is_no_config_is_refused_by_its_name(text: str) -> None:
    with refused("digits.yaml", error=ConfigError):
        from_yaml(text, origin="digits.yaml")


# Ten million values in 300 bytes.
_REPEATED = (f"&{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in pairwise("abcdefgh"))
ALIASES = f"[&a [x], {', '.join(_REPEATED)}]"


def test_what_would_take_all_time_or_memory_is_one_short_line() -> None:
    deep = "[" * 200_000, "- " * 4000, "? " * 4000, f"{DIGITS}x: {'{a: ' * 4000}", f"x: {'[' * 40}{']' * 40}"
    for text in (*deep, f"{DIGITS}x: {ALIASES}", f"seed: 0x{'F' * 6000}", f"seed: 1{':1' * 6000}"):
        with refused("mine.yaml", error=ConfigError) as caught:
            from_yaml(text, origin="mine.yaml")
        assert len(str(caught.value)) < 500
    tolerations, path = "compute.kuberay.tolerations", "compute.kuberay.node_selector" + ".a" * 5000
    for key, override in (
        *((tolerations, f"{tolerations}={value}") for value in (ALIASES, "[" * 4000, f"[{{a: 0x{'F' * 6000}}}]")),
        ("--set", f"{path}=1"),
        ("seed", f"seed=[{'1, ' * 5000}]"),
    ):
        with refused(key, error=ConfigError) as caught:
            from_yaml(DIGITS, overrides=[override])
        assert len(str(caught.value)) < 500


def test_a_value_in_place_of_a_section_is_refused_by_its_key() -> None:
    with refused("noise", "train.ema", "storage"):
        from_yaml(DIGITS, overrides=["noise=autoo", "train.ema=half_life", "storage=.ncsn"])
    with refused("network.widths", error=ConfigError) as caught:
        from_yaml(DIGITS, overrides=["network={kind: unet, widths: 8}"])
    assert caught.value.problems[0].hint.endswith(" network.widths=[8]")


NCSN = "network={kind: ncsn}"
MULTIPLIERS = "network.multipliers"
CLASSES = ["data.num_classes=10", "train.label_dropout=0.1"]
GUIDED = "sampling.guidance={kind: classifier_free}"
OWN = "data.source=image_folder"
LOGNORMAL = "noise.training={kind: lognormal}"
TAUGHT = ["loss.pairs=teacher", "loss.guidance={kind: classifier_free}"]
TUNED = ["loss={kind: consistency}", "sampling.sampler={kind: consistency}", LOGNORMAL, "train.init_from=x"]
WRONG_ALONE = (
    "noise.sigma_1=0.001", "network.kind=resnet", "optimizer.learning_rate=.nan", "name=Foo Bar",
    "data.source=imagenet", "train.num_images=1", "data.value_range=[0, 1]", "tracking.registered_model=a/b",
    "compute.kuberay.head_memory=much", "compute.ray_jobs.address=head", "seed.x=1", "noise.sigma_1=[",
    "data.leave_out=[a]", "sampling.levels={sigma_1: 3.0, sigma_L: 0.03, num_levels: 5}",
    "network.attention_sizes=[4,5]", "data.image_size=[28,4]", "train.label_dropout=0.1", "sampling.label=3",
    "sampling.label={a: 500, b: 12}", *(f"compute.num_workers={value}" for value in (0, 1.5, "true")),
    *(f"compute.num_workers={value}" for value in ([2, 1], [1, 2, 3], [1, 4097])),
)  # fmt: skip
WRONG = [
    *(([override], override.partition("=")[0]) for override in WRONG_ALONE),
    (["optimizer.muon={learning_rate: 2}"], "optimizer.muon.learning_rate"),
    (["optimizer.decay=linear", "optimizer.decay_images=200000000"], "optimizer.decay_images"),
    (["optimizer.decay=cosine", "optimizer.decay_images=2000"], "optimizer.decay_images"),
    (["train.continue_from=x", "search={}"], "train.continue_from"),
    (["foo.bar=1"], "foo"),
    (["network.widths=[8,a]"], "network.widths.1"),
    (["noise={num_levels: 1}"], "noise.sigma_1"),
    (["evaluation.extractor=inception"], "evaluation.weights"),
    (["evaluation={extractor: dinov2, weights: x}", "data.channels=4", OWN], "evaluation.extractor"),
    (["data.channels=4"], "data.source"),
    (["data.dtype=float32"], "data.source"),
    (["data.dtype=uint16", "data.value_range=[0, 70000]", OWN], "data.value_range"),
    (["data.dtype=uint16", "data.value_range=[0.5, 70]", OWN], "data.value_range"),
    (["data.dtype=float32", "data.value_range=[1, 1]", OWN], "data.value_range"),
    (["noise"], "--set"),
    (["loss={kind: ssm}", "compute.compile=true"], "compute.compile"),
    ([NCSN, "sampling.sampler={kind: karras_heun}"], "sampling.sampler.kind"),
    (["data.augmentation={}", "data.horizontal_flip=true"], "data.horizontal_flip"),
    ([NCSN, "sampling.sampler={kind: dpm_solver}"], "sampling.sampler.num_levels"),
    ([NCSN, "sampling.sampler={kind: dpm_solver, num_levels: 21}"], "sampling.sampler.num_levels"),
    (["sampling.sampler={kind: langevin, level: 20}"], "sampling.sampler.level"),
    (["sampling.sampler={kind: annealed_langevin, consistent: true, epsilon: 0.5}"], "sampling.sampler.epsilon"),
    (["noise={sigma_1: 0.01, num_levels: 1}"], "sampling.sampler.kind"),
    ([NCSN, "noise.training={kind: lognormal}"], "noise.training.kind"),
    (["noise.training={kind: lognormal}", "sampling.levels={sigma_1: 0.01, sigma_L: 0.01}"], "sampling.levels.sigma_1"),
    ([NCSN, "loss.weighting=edm"], "loss.weighting"),
    ([NCSN, "data.image_size=[28,27]"], "data.image_size"),
    (["data.image_size=[32,8]", "network.widths=[8,8,8,8,8]"], "network.widths"),
    (["network={kind: ddpmpp, multipliers: [1, 1, 1], attention_sizes: []}", "data.image_size=[16,18]"], MULTIPLIERS),
    (["data.num_classes=10", NCSN], "data.num_classes"),
    ([*CLASSES, "sampling.label={a: 9000000, b: 9000000}"], "sampling.label"),
    ([*CLASSES, "export={fill: true, per_class: 10}"], "export.per_class"),
    ([*CLASSES, "sampling.label={a: 0}"], "sampling.label"),
    ([*CLASSES, "sampling.label={no: 512}"], "sampling.label"),
    (["sampling={label: no, sampler: {kind: langevin}}"], "sampling.label"),
    ([GUIDED], "sampling.guidance.kind"),
    (["data.num_classes=10", GUIDED], "sampling.guidance.kind"),
    (
        [*CLASSES, GUIDED, "sampling.guidance.sigma_min=2", "sampling.guidance.sigma_max=1"],
        "sampling.guidance.sigma_min",
    ),
    ([*CLASSES, "sampling.guidance={kind: classifier_free, checkpoint: x}"], "sampling.guidance.checkpoint"),
    (["loss={kind: consistency}", LOGNORMAL, "train.init_from=x"], "sampling.sampler.kind"),
    (["sampling.sampler={kind: consistency}"], "sampling.sampler.kind"),
    ([*TUNED[:2], "train.init_from=x"], "loss.kind"),
    (TUNED[:3], "train.init_from"),
    ([*TUNED, *TAUGHT], "loss.guidance"),
    ([*TUNED, "data.num_classes=10", "loss.guidance={kind: classifier_free}"], "loss.guidance"),
    ([*TUNED, *TAUGHT, "data.num_classes=10", "loss.guidance.sigma_min=inf"], "loss.guidance.sigma_min"),
    ([*TUNED[:3], "loss.from_scratch=true", "loss.pairs=teacher"], "loss.pairs"),
    ([*TUNED, "loss.from_scratch=true"], "train.init_from"),
    ([*TUNED, "sampling.guidance={kind: autoguidance, checkpoint: x}"], "sampling.guidance"),
    ([*TUNED, "loss.stages=8"], "loss.stages"),
    ([*TUNED, "sampling.sampler={kind: consistency, sigmas: [1.0]}"], "sampling.sampler.sigmas"),
    ([*TUNED, "sampling.sampler={kind: consistency, steps: 3, sigmas: [0.1]}"], "sampling.sampler.sigmas"),
    ([*TUNED, "sampling.levels={sigma_1: 0.3, sigma_L: 0.01, num_levels: 9}"], "sampling.sampler.sigmas"),
]


@pytest.mark.parametrize(("overrides", "key"), WRONG)
def test_what_is_wrong_or_does_not_go_together_is_named(overrides: list[str], key: str) -> None:
    with refused(key, error=ConfigError):
        from_yaml(DIGITS, overrides=overrides)


@pytest.mark.parametrize(
    ("network", "size", "nearest"),
    [
        ("{kind: ddpmpp, multipliers: [1, 1, 1, 1], attention_sizes: []}", "50", "48 or 56"),
        ("{kind: ddpmpp, multipliers: [1, 1, 1, 1], attention_sizes: []}", "[30, 33]", "[24, 32] or [32, 40]"),
        ("{kind: ncsn}", "[30, 33]", "[30, 32] or [30, 34]"),
    ],
)
def test_the_nearest_sizes_that_a_network_takes_are_named(network: str, size: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_yaml(DIGITS, overrides=[f"data.image_size={size}", f"network={network}"])
    assert [problem.hint.endswith(nearest) for problem in caught.value.problems] == [True]


def test_a_problem_is_blamed_on_the_text_or_on_what_changes_it() -> None:
    wrong = DIGITS.replace("batch_size: 64", "batch_size: many", 1)
    own, changed = ("FILE", "train.batch_size"), ("--set", "seed")
    cases = (wrong, [], {own}), (DIGITS, ["seed=x"], {changed}), (wrong, ["seed=x"], {own, changed})
    for text, overrides, blamed in (*cases, (DIGITS, ["compute.num_workers=65"], {("--set", own[1])})):
        with pytest.raises(ConfigError) as caught:
            from_yaml(text, overrides=overrides, origin="FILE")
        assert {(problem.origin, problem.key) for problem in caught.value.problems} == blamed


@pytest.mark.parametrize(("workers", "pods"), [("8", ""), ("[4, 8]", ""), ("6", "1.5 pods"), ("[2, 8]", "0.5 pods")])
def test_workers_fill_their_pods(workers: str, pods: str) -> None:
    overrides = [f"compute.num_workers={workers}", "compute.kuberay.workers_per_pod=4"]
    assert from_yaml(DIGITS, overrides=overrides).compute.backend == "local", "where there are no pods"
    if not pods:
        assert from_yaml(DIGITS, overrides=["compute.backend=kuberay", *overrides]).compute.max_workers == 8
        return
    with refused("compute.num_workers", error=ConfigError) as caught:
        from_yaml(DIGITS, overrides=["compute.backend=kuberay", *overrides])
    assert pods in caught.value.problems[0].reason


def test_a_gpu_is_why_networks_are_compiled_and_channels_go_last() -> None:
    def chosen(*overrides: str) -> tuple[bool, bool]:
        found = from_yaml(DIGITS, overrides=overrides)
        return found.compute.compiled, build.memory_format(found) is torch.channels_last

    assert chosen() == (False, False) and chosen("compute.use_gpu=true", "loss={kind: ssm}") == (True, True)
    for value in (False, True):
        given = [f"compute.{setting}={str(value).lower()}" for setting in ("compile", "channels_last")]
        assert chosen(*given) == chosen(*given, "compute.use_gpu=true") == (value, value)


def test_all_that_is_missing_or_does_not_go_together_is_named() -> None:
    with refused("data", "network", "train", "sampling", error=ConfigError):
        from_yaml("name: x")
    with refused("train.batch_size", "train.label_dropout", error=ConfigError):
        from_yaml(DIGITS, overrides=["train.label_dropout=0.1", "compute.num_workers=4000"])


def test_counts_by_class_set_the_number_of_images() -> None:
    for label, count in (("balanced", 512), ("{a: 500, b: 13}", 513), ("{a: 2}", 2)):
        assert from_yaml(DIGITS, overrides=[*CLASSES, f"sampling.label={label}"]).sampling.num_images == count


@pytest.mark.parametrize("typed", ["yes", "no", "null", "~", "nan", "1e3", "3.50", "010", "a: b", "#1", "2024-01-31"])
def test_text_is_taken_as_it_is_typed(typed: str) -> None:
    keys = ("tracking.experiment", "sampling.label", "compute.kuberay.node_selector.disk", "data.label_column")
    config = from_yaml(DIGITS, overrides=["data.num_classes=10", *(f"{key}= {typed} " for key in keys)])
    assert (config.tracking.experiment, config.sampling.label) == (typed, typed)
    assert config.compute.kuberay.node_selector == {"disk": typed}
    assert config.data.label_column == (None if typed in ("null", "~") else typed)
    in_quotes = ["data.num_classes=10", f"sampling.label='{typed}'", "data.label_column='null'"]
    quoted = from_yaml(DIGITS, overrides=in_quotes)
    assert (quoted.sampling.label, quoted.data.label_column) == (typed, "null")
    assert from_yaml(to_yaml(config)) == config
    assert from_yaml(to_yaml(quoted), overrides=overrides_between(quoted, config)) == config


@pytest.mark.parametrize(
    ("settings", "num_classes", "extractor"),
    [
        ([], 10, "classifier"),
        ([], 1, "clusters"),
        (["evaluation.weights=w.pth"], 10, "inception"),
        (["evaluation.weights=w.pth", "evaluation.extractor=clusters"], 0, "clusters"),
        (["evaluation.weights=w.pth", "evaluation.extractor=dinov2"], 10, "dinov2"),
    ],
)
def test_the_extractor_of_auto_follows_weights_and_classes(
    settings: list[str], num_classes: int, extractor: str
) -> None:
    config, manifest = from_yaml(DIGITS, overrides=settings), SimpleNamespace(class_counts={"train": [5] * num_classes})
    assert evaluation_of(config, manifest).extractor == extractor
    assert config.evaluation.pretrained == (extractor if extractor in ("inception", "dinov2") else None)


@pytest.mark.parametrize("counts", [[], [5], [0, 0]])
def test_training_is_refused_where_a_classifier_of_these_classes_would_be(counts: list[int]) -> None:
    config = from_yaml(DIGITS, overrides=["evaluation.extractor=classifier"])
    with refused("evaluation.extractor"):
        require_classes(config, SimpleNamespace(class_counts={"train": counts}), "the dataset")  # type: ignore[arg-type]


def test_what_is_written_otherwise_is_the_same() -> None:
    assert from_yaml(DIGITS, overrides=["data.image_size=[8, 8]"]) == from_yaml(DIGITS)
    assert from_yaml(DIGITS, overrides=["optimizer.learning_rate=2e-4"]).optimizer.learning_rate == 2e-4


def test_a_setting_of_a_section_that_is_null_makes_the_section() -> None:
    text = to_yaml(from_yaml(DIGITS, overrides=["data.num_classes=10"]))
    assert all(f"\n{section}: null\n" in text for section in ("utility", "search"))
    config = from_yaml(text, overrides=["utility.updates=300", "search.num_trials=3"])
    assert config.utility and (config.utility.updates, config.utility.seeds) == (300, 5)
    assert config.search and config.search.num_trials == 3
    for override, key in (("data.root.x=1", "data.root"), ("sampling.guidance.weight=2", "sampling.guidance.kind")):
        with refused(key, error=ConfigError):
            from_yaml(text, overrides=[override])


def test_changed_settings_ignore_where_the_work_happens_and_how_often_something_is_kept() -> None:
    one = from_yaml(DIGITS)
    place = ["compute.num_workers=[1, 2]", "storage.root=s3://b/p", "data.root=/elsewhere"]
    kept = ["train.keep_checkpoints=1", "train.checkpoint_every_images=777"]
    elsewhere = from_yaml(DIGITS, overrides=[*place, *kept, "sampling.seed=3", "search.num_trials=3"])
    assert changed_settings(one, elsewhere) == {} and from_yaml(to_json(elsewhere)) == elsewhere
    assert changed_settings(one, from_yaml(DIGITS, overrides=["seed=5"])) == {"seed": (0, 5)}


def test_a_background_is_a_word_or_three_bytes() -> None:
    for value, color in (("none", None), ("white", (255, 255, 255)), ("[1, 2, 3]", (1, 2, 3))):
        config = from_yaml(DIGITS, overrides=[f"data.background={value}"])
        assert Fit.of(config.data).background == color
        assert from_yaml(to_json(config)) == from_yaml(to_yaml(config)) == config
    for wrong in ("blue", "null", "[1, 2]", "[1, 2, 300]", "[1, 2, -1]", "[1, 2, 0.5]", "3"):
        with refused("data.background"):
            from_yaml(DIGITS, overrides=[f"data.background={wrong}"])


def sections(model: type[Any]) -> Iterator[type[Any]]:
    yield model
    for name in fields_of(model):
        for section in section_models(model, name):
            yield from sections(section)


@pytest.mark.parametrize("model", list(sections(Config)), ids=lambda model: model.__name__)
def test_every_section_and_setting_is_described(model: type[Any]) -> None:
    assert model.__doc__
    values = {name: field for name, field in fields_of(model).items() if not section_models(model, name)}
    assert [name for name, field in values.items() if not field.description] == []
