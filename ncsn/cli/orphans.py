"""`ncsn reap`."""

from __future__ import annotations

import re

import click

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_TIME = re.compile(r"(\d+(?:\.\d+)?)([smhd]?)")


def reap_orphans(*, namespace: str | None, run: str | None, older_than: str, dry_run: bool) -> None:
    """Delete the RayJobs that no launcher waits for, or list them, one line each."""
    from ncsn.cluster.api import KubernetesApi
    from ncsn.cluster.reap import find_orphans, reap

    seconds = _seconds(older_than)
    api = KubernetesApi(namespace)
    find = find_orphans if dry_run else reap
    orphans = find(api, older_than=seconds, run=run)
    for orphan in orphans:
        click.echo(
            f"{'would delete' if dry_run else 'deleted'} {orphan.name}: run {orphan.run}, step {orphan.step}, "
            f"{orphan.state}, no sign of its launcher for {_words(orphan.silent_seconds)}"
        )
    if not orphans:
        click.echo(f"no RayJob in {api.namespace} whose launcher has been silent for {_words(seconds)}")


def _seconds(text: str) -> float:
    match = _TIME.fullmatch(text)
    if match is None:
        raise ValueError(f"--older-than {text!r} is not a time; write for example 30m, 2h or 1d")
    return float(match[1]) * _UNITS[match[2] or "s"]


def _words(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes // 60} h {minutes % 60} min"
