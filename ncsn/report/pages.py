"""Pages: the report in HTML, and in Markdown the model card in the registry and the page of a run in KFP.

The report is one file that loads nothing: pictures are `data:` URIs, plots are SVG. A content security policy in the
page forbids every request and every script, whatever its texts contain. Imports no torch.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ncsn.config import Config
from ncsn.config.training import LognormalTraining, ema_setting
from ncsn.report import words
from ncsn.report.words import (
    CLASSES_HEAD,
    SCORES_HEAD,
    candidate_lines,
    candidates_head,
    class_lines,
    few_samples,
    markdown_table,
    score_rows,
)

if TYPE_CHECKING:
    from ncsn.data.format import Manifest

TEMPLATES = Path(__file__).with_name("templates")
# Digest of the templates, which decide how a page looks.
LOOK = hashlib.sha256(b"\0".join(path.read_bytes() for path in sorted(TEMPLATES.iterdir()))).hexdigest()[:16]
MOST_CANDIDATES = 5
INTENDED = (
    "For studying and demonstrating score-based generative models, and for synthetic images that resemble the dataset "
    "and are labeled as synthetic. Not for decisions about real things or people, and not a replacement for the "
    "dataset."
)
LIMITS = (
    "The images are samples from a distribution fitted to the data above, with its biases and its resolution. They are "
    "not evidence of anything real. The metrics `copies` and `closeness` tell how close they are to training "
    "images.",
    "The scores hold only for this sampler, number of images and extractor. They are comparable with published "
    "Inception Scores or FID only if the extractor is the 2015 Inception network, and with published FD-DINOv2 only if "
    "it is DINOv2.",
)
MOST_NAMES, MOST_ROWS = 20, 12  # of classes, so that the card stays short


def render(**records: Any) -> str:
    """The page of these records, which `templates/report.html.j2` names, as HTML."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "data_uri": lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}",
        "count": lambda number: f"{number:,.0f}",
        "svg": Markup,  # drawn by our own plots
    }
    environment.globals["words"] = words
    style = Markup((TEMPLATES / "report.css").read_text())  # noqa: S704  (our own file)
    return environment.get_template("report.html.j2").render(style=style, **records)


@dataclass(frozen=True)
class ModelFacts:
    """What a model card says of the model and where it comes from."""

    name: str  # of the registered model
    run: str
    checkpoint: str  # digest
    images_seen: int
    num_parameters: int
    nfe: int
    cost: str = ""
    pictures: Mapping[str, str] | None = None  # description -> file next to the card
    warnings: Sequence[str] = ()  # signs of overfitting
    selection: Mapping[str, Any] | None = None  # result of the step that chose the checkpoint among others
    relative_width: float | None = None  # of the average, if it was put together after training


def model_card(facts: ModelFacts, *, config: Config, manifest: Manifest, evaluation: Mapping[str, Any]) -> str:
    """Markdown below 5000 characters, which fits a registry description; `evaluation` is the result of that step."""
    kind = manifest.pixels.dtype
    label = "" if config.data.num_classes is None else f', "label": "{manifest.class_names[0]}"'
    counts = ", ".join(f"{count:,} {split}" for split, count in manifest.counts.items())
    skipped = f"; {len(manifest.skipped)} more could not be used" if manifest.skipped else ""
    scores = [(f"`{row.name}`", row.text, row.real_text) for row in score_rows(evaluation)]
    notes = [*evaluation["notes"], "in parentheses are 95 % intervals, over other samples of this number"]
    parts = [
        f"# {facts.name}",
        f"Generates {manifest.pixels} images: {config.loss.model}, trained on "
        f"{manifest.name} in run `{facts.run}`, checkpoint `{facts.checkpoint}`.",
        f"{evaluation['verdict']}.",
        "## Use\n\n```python\nimport mlflow\n\n"
        f'model = mlflow.pyfunc.load_model("models:/{facts.name}@champion")\n'
        f'images = model.predict(None, params={{"n_images": 16, "seed": 1{label}}})  # {kind} [16, H, W, C]\n```',
        " ".join(f"![{shown}]({file})" for shown, file in (facts.pictures or {}).items()),
        f"## Intended use\n\n{INTENDED}",
        f"## Data\n\n{manifest.source.rstrip('.')}. Images: {counts}{skipped}. Content digest `{manifest.digest}`.",
        f"## Settings\n\n{markdown_table(('', ''), _settings(facts, config))}",
        f"## Scores\n\n{markdown_table(SCORES_HEAD, scores)}\n\n" + "\n".join(f"- {note}" for note in notes),
    ]
    if chosen := facts.selection:
        lines = candidate_lines(chosen["candidates"], most=MOST_CANDIDATES)
        parts += [
            "## Choice of the checkpoint",
            markdown_table(candidates_head(f"`{chosen['figure']}`"), lines),
            f"The best of {len(chosen['candidates'])} candidates. This score is optimistic because it was selected; "
            f"the scores above use new samples. {few_samples(chosen['figure'])}",
        ]
    if classes := evaluation.get("classes"):
        names = ", ".join(f"`{name}`" for name in manifest.class_names[:MOST_NAMES])
        more = len(manifest.class_names) - MOST_NAMES
        parts += [
            f"## Classes\n\nIt makes images of these on demand: {names}{f' and {more} more' if more > 0 else ''}.",
            markdown_table(CLASSES_HEAD, class_lines(classes, most=MOST_ROWS)),
        ]
    parts += [
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in (*facts.warnings, *LIMITS)),
        f"## License\n\nCode: Apache-2.0. The weights derive from the data, which has these terms: {manifest.license}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _settings(facts: ModelFacts, config: Config) -> list[tuple[str, str]]:
    noise, optimizer, train, sampling = config.levels, config.optimizer, config.train, config.sampling
    clip = f", gradient norm at most {optimizer.grad_clip_norm:g}" if optimizer.grad_clip_norm else ""
    muon = f"Muon at {optimizer.muon.learning_rate:g} and " if optimizer.muon else ""
    width = facts.relative_width
    average = ema_setting(train) if width is None else f"relative width {width:g}"
    settings = {
        "network": f"{config.network.kind}, {facts.num_parameters:,} parameters, EMA of {average}",
        "training": f"{facts.images_seen:,} images, batch {train.batch_size}, {muon}Adam at "
        f"{optimizer.learning_rate:g} ({optimizer.decay}){clip}",
    }
    if config.loss.summary:
        settings["loss"] = config.loss.summary
    if train.init_from is not None:
        settings["start"] = (
            f"the weights of {train.init_from}, which derive from its data; train.trainable = {train.trainable}"
        )
    settings["noise"] = f"{noise.num_levels} levels, sigma {noise.sigma_1:g} to {noise.sigma_L:g}"
    if isinstance(any_sigma := config.noise.training, LognormalTraining):
        settings["noise"] += f"; trained at any sigma, ln sigma ~ N({any_sigma.mean:.4g}, {any_sigma.std:.4g}²)"
    chosen = ", ".join(f"{name} {value}" for name, value in asdict(sampling.sampler).items())
    settings["sampler"] = f"{chosen}: NFE {facts.nfe}"
    if guidance := sampling.guidance or config.loss.guidance:  # never both
        band = f"above sigma {guidance.sigma_min:g} up to {guidance.sigma_max:g}"
        learned = "" if sampling.guidance else ", learned in training"
        settings["guidance"] = f"{guidance.kind}, weight {guidance.weight:g}, {band}{learned}"
    if config.data.num_classes is not None and sampling.label != "balanced":
        asked = sampling.label
        shown = asked if isinstance(asked, str) else ", ".join(f"{count:,} {name}" for name, count in asked.items())
        settings["classes of the samples"] = shown
    settings["seed"] = str(config.seed)
    return [*settings.items(), *([("cost", facts.cost)] if facts.cost else [])]


def run_page(
    run: str, *, status: str, reason: str, steps: Mapping[str, str], places: Mapping[str, str], notes: Sequence[str]
) -> str:
    """The page that KFP shows for a run. Its viewer knows tables and links, but no HTML.

    `steps` are step -> its state, `places` are name -> address, URI or digest; an empty one is left out.
    """
    lines = [f"# {run}: {status}", ""]
    if reason:
        lines += [*(f"> {_plain(line)}" for line in reason.splitlines() if line.strip()), ""]
    lines += ["| step | state |", "|---|---|", *(f"| {step} | {_plain(state)} |" for step, state in steps.items()), ""]
    lines += ["| name | location |", "|---|---|"]
    for name, place in places.items():
        if place:
            is_page = place.startswith(("http://", "https://"))
            lines.append(f"| {name} | <{place}> |" if is_page else f"| {name} | `{place}` |")
    lines += ["", *(f"- {_plain(note)}" for note in notes)]
    return "\n".join(lines).rstrip() + "\n"


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
