"""Results, costs and origins of a run in words. Imports no torch, because the command line uses it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ncsn.runs.folder import Cost

MINUTE, HOUR, DAY = 60, 3600, 86400


class Fact(NamedTuple):
    """A line of a list: a name, and an ID, an address or a version."""

    label: str
    value: str
    link: str = ""


def duration(seconds: float) -> str:
    """`42 s`, `3.5 min`, `2.1 h` or `4.0 days`."""
    if seconds < 2 * MINUTE:
        return f"{seconds:,.0f} s"
    if seconds < 2 * HOUR:
        return f"{seconds / MINUTE:,.1f} min"
    return f"{seconds / HOUR:,.1f} h" if seconds < 2 * DAY else f"{seconds / DAY:,.1f} days"


def cost_line(costs: Collection[Cost]) -> str:
    """What some steps reserved, together; empty without any."""
    if not costs:
        return ""
    total = Cost(*map(sum, zip(*costs, strict=True)))
    gpu = f" · {total.gpu_hours:,.2g} GPU hours" if total.gpu_hours else ""
    return f"{duration(total.seconds)} · {total.cpu_hours:,.2g} CPU hours{gpu}"


def cost_facts(spent: Mapping[str, Cost], *, num_images: int) -> Iterator[Fact]:
    """What the run reserved, and 1,000 more images would; `num_images` are those of the sample step."""
    if not spent:
        return
    # The times of the steps above are those of their last attempt, without its startup.
    yield Fact("Reserved, with startup and earlier attempts", cost_line(spent.values()))
    if "sample" in spent and num_images:
        scaled = Cost(*(1000 / num_images * amount for amount in spent["sample"]))
        yield Fact("Per 1,000 images", cost_line([scaled]))


DIGEST_SHOWN = 12


def result_line(step: str, result: Mapping[str, Any]) -> str:
    """The stored result of a step in one line."""
    match step:
        case "ingest":
            counts = " + ".join(f"{count:,} {split}" for split, count in result["counts"].items())
            return f"{counts} images, digest {result['digest'][:DIGEST_SHOWN]}"
        case "tune":
            before = "" if result["baseline"] is None else f" (original settings: {result['baseline']:.4g})"
            return f"{result['objective_name']} = {result['objective']:.4g}{before}, {len(result['trials'])} trials"
        case "train":
            loss = "" if result["loss"] is None else f", loss {result['loss']:.4f}"
            return f"{result['images_seen']:,} images{loss}, {result['images_per_second']:,.0f} images/s"
        case "sample":
            return f"{result['num_images']:,} images, {result['nfe']:,} network evaluations per image"
        case "evaluate":
            return f"{result['gate']['name']} = {result['gate']['value']:.4g}"
        case "register":
            aliases = ", ".join(result["aliases"]) or "no alias"
            return f"{result['model']} version {result['version']} ({aliases})"
        case "report":
            return f"{result['size'] / 1000:,.0f} kB"
        case "select":
            best = f"{result['figure']} = {result['value']:.4g} at {result['images_seen']:,} images"
            return f"{best}, the best of {len(result['candidates'])}"
    raise AssertionError(step)


# The other tags are versions of packages, or for MLflow alone.
TAGS = {
    "mlflow.source.git.commit": "Git commit",
    "mlflow.docker.image.uri": "Image",
    "kfp.pipeline_run_id": "KFP run",
    "ray.submission_id": "Ray submission",
    "ray.job_id": "Ray job",
    "ray.session": "Ray session",
    "mlflow.user": "Started by",
}
LINKS = {"kfp.pipeline_run_id": "kfp.pipeline_run_url", "ray.submission_id": "ray.dashboard_url"}
VERSION = ".version"


def tag_facts(runs: Sequence[Mapping[str, str]]) -> list[Fact]:
    """Facts from the tags of MLflow runs; where steps have different values, all of them in order."""
    facts = []
    for tag, label in TAGS.items():
        if values := _values(runs, tag):
            links = _values(runs, LINKS.get(tag, ""))
            # A tag may hold anything; only an address of a page becomes a link.
            link = links[0] if links and links[0].startswith(("http://", "https://")) else ""
            facts.append(Fact(label, ", ".join(values), link))
    versions = {tag.removesuffix(VERSION): None for tags in runs for tag in tags if tag.endswith(VERSION)}
    if versions:
        shown = (f"{name} {', '.join(_values(runs, name + VERSION))}" for name in versions)
        facts.append(Fact("Versions", " · ".join(shown)))
    return facts


def _values(runs: Sequence[Mapping[str, str]], tag: str) -> list[str]:
    return list(dict.fromkeys(tags[tag] for tags in runs if tags.get(tag)))
