"""`ncsn reap`."""

from __future__ import annotations

import re

import click

from ncsn.cli.failures import describe
from ncsn.errors import UserError

_PATIENCE_SECONDS = 30.0
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_TIME = re.compile(r"(\d+(?:\.\d+)?)([smhd]?)")


def reap_orphans(*, namespace: str | None, run: str | None, older_than: str, at_work: bool, dry_run: bool) -> bool:
    """Do what is left to do, or list it, one line each; whether all of it could be done."""
    from ncsn.remote.kubernetes import KubernetesApi
    from ncsn.steps.janitor import clean_up

    api, well, deeds = KubernetesApi(namespace, patience=_PATIENCE_SECONDS), True, 0
    for deed in clean_up(api, older_than=_seconds(older_than), run=run, at_work=at_work, dry_run=dry_run):
        deeds += 1
        if deed.error is None:
            click.echo(f"would {deed.verb} {deed.what}" if dry_run else f"{deed.verb}d {deed.what}")
        else:
            well = False
            click.echo(f"error: could not {deed.verb} {deed.what}: {'; '.join(describe(deed.error).lines)}", err=True)
    if not deeds:
        click.echo(f"nothing to do in {api.namespace}")
    return well


def _seconds(text: str) -> float:
    match = _TIME.fullmatch(text)
    if match is None:
        raise UserError("--older-than", "not a time", hint="write for example 30m, 2h or 1d", value=text)
    return float(match[1]) * _UNITS[match[2] or "s"]
