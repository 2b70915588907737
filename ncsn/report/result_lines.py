"""The result of a step in a few words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DIGEST_SHOWN = 12


def result_line(step: str, result: Mapping[str, Any]) -> str:
    """What came of a step.

    Args:
        step: Its name.
        result: Its stored result, as plain values.
    """
    match step:
        case "ingest":
            counts = " + ".join(f"{count:,} {split}" for split, count in result["counts"].items())
            return f"{counts} images, digest {result['digest'][:DIGEST_SHOWN]}"
        case "tune":
            before = "" if result["baseline"] is None else f" (the config as it stands: {result['baseline']:.4g})"
            return f"{result['objective_name']} = {result['objective']:.4g}{before}, {len(result['trials'])} trials"
        case "train":
            loss = "" if result["loss"] is None else f", loss {result['loss']:.4f}"
            return f"{result['images_seen']:,} images{loss}, {result['images_per_second']:,.0f} images/s"
        case "sample":
            return f"{result['num_images']:,} images, {result['nfe']:,} network evaluations each"
        case "evaluate":
            return f"{result['gate']['name']} = {result['gate']['value']:.4g}"
        case "register":
            aliases = ", ".join(result["aliases"]) or "no alias"
            return f"{result['model']} version {result['version']} ({aliases})"
        case "figures":
            return f"{len(result['figures'])} figures: {', '.join(result['figures'])}"
        case "report":
            return f"{result['size'] / 1000:,.0f} kB, {len(result['sections'])} sections"
    raise AssertionError(step)
