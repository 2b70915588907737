"""The model card: one page of Markdown that says what a version is, how good, and what it is not for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ncsn.config import Config
from ncsn.data.format import Manifest
from ncsn.model.checkpoint import SamplingCheckpoint
from ncsn.model.generate import evaluations_per_image

INTENDED = (
    "For studying and demonstrating score-based generative models, and for images like those of the data set where "
    "invented ones are wanted and called so. Not for deciding anything about real things or people, and not in place "
    "of the data set as a record."
)
LIMITS = (
    "The images are samples of a distribution that was fitted to the data above and carry its biases and its "
    "resolution. They are no evidence of anything real. The figures `memorised` and `nn_distance` say how near they "
    "come to training images.",
    "The scores hold for this sampler setting, sample count and extractor only, and do not compare with published "
    "Inception scores or FID unless the extractor is the 2015 Inception graph.",
)


@dataclass(frozen=True)
class Scores:
    """Figures of the samples beside those of real test images.

    Attributes:
        metrics: `eval/<figure>_n<count>` of the samples.
        real_metrics: `eval/real_<figure>_n<count>` of real test images.
        fingerprint: Hash of extractor and reference images.
        notes: What a reader of the figures should know.
        num_splits: Parts of the samples whose scores deviate by `score_std`.
    """

    metrics: Mapping[str, float]
    real_metrics: Mapping[str, float]
    fingerprint: str
    notes: Sequence[str]
    num_splits: int


def model_card(
    name: str,
    *,
    checkpoint: SamplingCheckpoint,
    manifest: Manifest,
    scores: Scores,
    run: str,
    cost: str = "",
    pictures: Mapping[str, str] | None = None,
) -> str:
    """The card as Markdown, below 5000 characters so that it fits a registry description.

    Args:
        name: Name of the registered model.
        checkpoint: Network and config.
        manifest: The data set that it was trained on.
        scores: Evaluation of its samples.
        run: Name of the pipeline run.
        cost: What making it took, in words; empty if it is not known.
        pictures: What it shows -> name of a picture beside the card.
    """
    shape = " x ".join(map(str, manifest.shape))
    parts = [
        f"# {name}",
        f"Generates {shape} images: a noise conditional score network (Song & Ermon 2019), trained on "
        f"{manifest.name} in run `{run}`, checkpoint `{checkpoint.digest}`.",
        " ".join(f"![{shown}]({file})" for shown, file in (pictures or {}).items()),
        "## Intended use",
        INTENDED,
        "## Data",
        _data(manifest),
        "## Settings",
        _table(("", ""), [*_settings(checkpoint), *([("cost", cost)] if cost else [])]),
        "## Scores",
        _scores(scores),
        "## Limits",
        "\n".join(f"- {limit}" for limit in LIMITS),
        "## Licence",
        f"Code: Apache-2.0. The weights derive from the data; its terms: {manifest.license}",
        "## Use",
        "```python\nimport mlflow\n\n"
        f'model = mlflow.pyfunc.load_model("models:/{name}@champion")\n'
        f'images = model.predict(None, params={{"n_images": 16, "seed": 1}})  # uint8 [16, H, W, C]\n```',
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _data(manifest: Manifest) -> str:
    counts = ", ".join(f"{count:,} {split}" for split, count in manifest.counts.items())
    skipped = f"; {len(manifest.skipped)} that did not decode were left out" if manifest.skipped else ""
    return f"{manifest.source.rstrip('.')}. Images: {counts}{skipped}. Content digest `{manifest.digest}`."


def _settings(checkpoint: SamplingCheckpoint) -> list[tuple[str, str]]:
    config = checkpoint.config
    parameters = sum(parameter.numel() for parameter in checkpoint.network.parameters())
    noise, sampler = config.levels, config.sampling.sampler
    return [
        (
            "network",
            f"{config.network.kind}, {parameters:,} parameters, EMA of decay {config.train.ema_decay:g}",
        ),
        ("training", f"{checkpoint.images_seen:,} images, batch {config.train.batch_size}, {_optimizer(config)}"),
        ("noise", f"{noise.num_levels} levels, sigma {noise.sigma_1:g} to {noise.sigma_L:g}"),
        (
            "sampler",
            ", ".join(f"{name} {value}" for name, value in sampler.model_dump().items())
            + f": NFE {evaluations_per_image(config)}",
        ),
        ("seed", str(config.seed)),
    ]


def _optimizer(config: Config) -> str:
    settings = config.optimizer
    clip = f", gradient norm at most {settings.grad_clip_norm:g}" if settings.grad_clip_norm else ""
    return f"Adam at {settings.learning_rate:g} ({settings.decay}){clip}"


def _scores(scores: Scores) -> str:
    real = {key.replace("/real_", "/").rpartition("_n")[0]: (key, value) for key, value in scores.real_metrics.items()}
    rows = []
    for key, value in scores.metrics.items():
        figure = key.rpartition("_n")[0]
        if figure.endswith("_std"):
            continue
        real_key, real_value = real.get(figure, ("", None))
        beside = "" if real_value is None else f"{real_value:.4g} ({real_key.rpartition('_')[2]})"
        rows.append((f"`{key}`", f"{value:.4g}", _interval(scores, key), beside))
    notes = "".join(f"\n- {note}" for note in (*scores.notes, f"fingerprint `{scores.fingerprint}`"))
    return f"{_table(('figure', 'this model', '95 % interval', 'real test images'), rows)}\n{notes}"


def _interval(scores: Scores, key: str) -> str:
    """Where the figure lies for other samples: from the jackknife for distances, from the splits for scores.

    The kernel distance has none: its subsets share images, so their deviation is not that of the mean.
    """
    figure, _, count = key.rpartition("_n")
    deviation = scores.metrics.get(f"{figure}_std_n{count}")
    if deviation is None or figure.endswith("_kid"):
        return ""
    error = 1.96 * (deviation / math.sqrt(scores.num_splits) if figure.endswith("_score") else deviation)
    return f"{scores.metrics[key] - error:.4g} to {scores.metrics[key] + error:.4g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
