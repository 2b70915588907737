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

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from ncsn.config import Config
from ncsn.config.training import ema_setting
from ncsn.report import words

if TYPE_CHECKING:
    from ncsn.data.format import Manifest

TEMPLATES = Path(__file__).with_name("templates")
# Digest of the templates, which decide how a page looks.
LOOK = hashlib.sha256(b"\0".join(path.read_bytes() for path in sorted(TEMPLATES.iterdir()))).hexdigest()[:16]


def render(template: str, **records: Any) -> str:
    """The page of the records that this file in `templates` names, as HTML or Markdown."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "data_uri": lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}",
        "count": lambda number: f"{number:,.0f}",
        "short": lambda number: f"{number:g}",
        "plain": lambda text: " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;"),
        "svg": Markup,  # drawn by our own plots
    }
    environment.globals |= {"words": words, "style": Markup((TEMPLATES / "report.css").read_text())}  # noqa: S704
    return environment.get_template(template).render(**records)


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
    width = facts.relative_width
    return render(
        "model_card.md.j2",
        facts=facts,
        config=config,
        manifest=manifest,
        evaluation=evaluation,
        average=ema_setting(config.train) if width is None else f"relative width {width:g}",
        sampler=asdict(config.sampling.sampler),
        scores=[(f"`{row.name}`", row.text, row.real_text) for row in words.score_rows(evaluation)],
    )
