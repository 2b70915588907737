"""Which ids, addresses and versions lead from a report to everything behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ncsn.report.page import Fact

TAGS = {
    "mlflow.source.git.commit": "Git commit",
    "mlflow.docker.image.uri": "Image",
    "kfp.pipeline_run_id": "KFP run",
    "ray.submission_id": "Ray submission",
    "ray.job_id": "Ray job",
    "ray.session": "Ray session",
    "mlflow.user": "Started by",
}
"""Tag -> its name in the report; the others are versions of packages, or of use to MLflow alone."""
LINKS = {"kfp.pipeline_run_id": "kfp.pipeline_run_url", "ray.submission_id": "ray.dashboard_url"}
VERSION = ".version"


def tag_facts(runs: Sequence[Mapping[str, str]]) -> list[Fact]:
    """Facts from the tags of MLflow runs; where several steps had different values, all of them in order.

    Args:
        runs: The tags of the whole run, then of each step.
    """
    facts = []
    for tag, label in TAGS.items():
        values = _values(runs, tag)
        links = _values(runs, LINKS.get(tag, ""))
        if values:
            facts.append(Fact(label, ", ".join(values), link=_safe(links[0]) if links else ""))
    versions = {tag.removesuffix(VERSION): None for tags in runs for tag in tags if tag.endswith(VERSION)}
    if versions:
        shown = (f"{name} {', '.join(_values(runs, name + VERSION))}" for name in versions)
        facts.append(Fact("Versions", " · ".join(shown)))
    return facts


def _values(runs: Sequence[Mapping[str, str]], tag: str) -> list[str]:
    return list(dict.fromkeys(tags[tag] for tags in runs if tags.get(tag)))


def _safe(address: str) -> str:
    """An address only if a browser would fetch it as a page: a tag may hold anything."""
    return address if address.startswith(("http://", "https://")) else ""
