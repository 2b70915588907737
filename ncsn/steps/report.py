"""Step 6: one self-contained HTML page about the run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from ncsn import storage
from ncsn.config import Config
from ncsn.report.html import look, render
from ncsn.runs.folder import claim_run
from ncsn.runs.records import ProgressFile
from ncsn.steps.gather import make_page, read_sources
from ncsn.steps.panels import FIGURES
from ncsn.steps.result import once
from ncsn.tracking.mlflow_runs import step_run

FILE = "report.html"


@dataclass(frozen=True)
class ReportResult:
    """A report.

    Attributes:
        uri: The HTML file.
        size: Its bytes.
        sections: Titles of its sections.
    """

    uri: str
    size: int
    sections: list[str]


def digest_of(uri: str) -> str:
    """SHA-256 of a file; empty if there is none."""
    return hashlib.sha256(storage.read_bytes(uri)).hexdigest() if storage.exists(uri) else ""


def run(config: Config, *, run: str, evaluation: str) -> ReportResult:
    """Write `<run>/report/report.html` from what the run's other steps left, whichever of them there are.

    Args:
        config: The experiment.
        run: Name of the run.
        evaluation: URI of the evaluation that the report is about, as the evaluate step leaves it.

    Raises:
        NotFound: if there is no evaluation, or its samples are gone.
        ValueError: if the page would be too large.
        TrackingError: if MLflow does not answer.
    """
    folder = claim_run(config, run)
    evaluation = storage.absolute(evaluation)
    sources = read_sources(config, folder, evaluation)

    def work(progress: ProgressFile) -> ReportResult:
        with step_run(config, run=run, step="report") as tracked:
            page = make_page(sources, tracked, progress=progress)
            text = render(page)
            uri = storage.join(folder.report, FILE)
            storage.write_text(uri, text)
            tracked.log_file(uri, to_parent=True)
            tracked.set_tags({"report.uri": uri})
            return ReportResult(uri=uri, size=len(text.encode()), sections=page.headings)

    return once(
        folder,
        "report",
        inputs={
            "evaluation": sources.evaluation,
            "steps": {step: record["finished_at"] for step, record in sources.records.items()},
            "config": config.model_dump(mode="json"),
            "figures": digest_of(storage.join(folder.report, FIGURES)),
            "look": look(),
        },
        result_type=ReportResult,
        outputs=lambda result: [result.uri],
        unit="images",
        work=work,
    )
