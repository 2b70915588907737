"""The page that KFP shows for a run, as Markdown: how it ended, and where everything about it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RunFacts:
    """What the page says.

    Attributes:
        run: Name of the run.
        status: FINISHED, FAILED or KILLED.
        reason: Why, if it did not finish.
        steps: Step -> how it stands, in the pipeline's order.
        places: What -> where: an address, a URI, a digest. An empty one is left out.
        notes: Sentences for the reader.
    """

    run: str
    status: str
    reason: str
    steps: Mapping[str, str]
    places: Mapping[str, str]
    notes: Sequence[str] = field(default_factory=tuple)


def run_page(facts: RunFacts) -> str:
    """Markdown that KFP's viewer, which knows tables and links but no HTML, shows as it is meant."""
    lines = [f"# {facts.run}: {facts.status}", ""]
    if facts.reason:
        lines += [*(f"> {_plain(line)}" for line in facts.reason.splitlines() if line.strip()), ""]
    lines += ["| step | |", "|---|---|", *(f"| {step} | {_plain(state)} |" for step, state in facts.steps.items()), ""]
    shown = {what: where for what, where in facts.places.items() if where}
    lines += ["| what | where |", "|---|---|", *(f"| {what} | {_place(where)} |" for what, where in shown.items()), ""]
    lines += [f"- {_plain(note)}" for note in facts.notes]
    return "\n".join(lines).rstrip() + "\n"


def _place(where: str) -> str:
    return f"<{where}>" if where.startswith(("http://", "https://")) else f"`{where}`"


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
