"""Tags that say which code, which versions, which image, and whose pipeline a run belongs to."""

from __future__ import annotations

import getpass
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

VERSIONS = ("ncsn", "torch", "ray", "kfp", "mlflow")
UNKNOWN = "unknown"
"""What the image says of its commit if nobody told it when it was built."""


def provenance(command: str) -> dict[str, str]:
    """The tags of a run that `command` opened."""
    tags = {"mlflow.source.name": command, "mlflow.source.type": "LOCAL", "python.version": platform.python_version()}
    for package in VERSIONS:
        try:
            tags[f"{package}.version"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    tags |= kfp_run()
    if image := container_image():
        tags["mlflow.docker.image.uri"] = image
    commit = os.environ.get("NCSN_COMMIT") or _git_commit()
    if commit not in (None, UNKNOWN):
        tags["mlflow.source.git.commit"] = commit
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (KeyError, OSError):  # a container's numeric user has no name
        tags["mlflow.user"] = str(os.getuid())
    return tags


def container_image() -> str:
    """The image that this process runs in; empty if it runs in none that anybody told it of.

    NCSN_IMAGE alone does not say so: a task that KFP executes on this machine has it, too, and so has a shell from
    which pipelines are submitted.
    """
    image = os.environ.get("NCSN_CONTAINER_IMAGE", "")
    return image or (os.environ.get("NCSN_IMAGE", "") if os.environ.get("NCSN_KFP_RUN_ID") else "")


def kfp_run() -> dict[str, str]:
    """The tags, those of KFP's own MLflow plugin, that name the KFP run that this process is a task of; or none.

    The run's id comes from the pod. The address of its page does if somebody told the namespace that of KFP's pages.
    """
    run, pages = os.environ.get("NCSN_KFP_RUN_ID"), os.environ.get("NCSN_KFP_UI")
    if not run:
        return {}
    page = {"kfp.pipeline_run_url": f"{pages.rstrip('/')}/#/runs/details/{run}"} if pages else {}
    return {"kfp.pipeline_run_id": run} | page


def _git_commit() -> str | None:
    """Commit of the checkout that this code runs from; None for an installed package."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
