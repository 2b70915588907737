"""What a launcher tells the driver that Ray's Jobs API starts for it, and how the driver answers to it.

Ray hands the metadata of a submitted job to its driver in an environment variable.
"""

from __future__ import annotations

import json
import os
import platform

PYTHON = "ncsn.python"
"""Key of the launcher's Python version in the metadata of a job."""


def job_metadata() -> dict[str, str]:
    """The metadata of the Ray job whose driver this process is; empty if it was not submitted by the Jobs API."""
    metadata = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})
    return {key: str(value) for key, value in metadata.items()}


def python_version() -> str:
    """The part of Python's version that must not differ between a launcher and its cluster."""
    return ".".join(platform.python_version_tuple()[:2])


def require_launchers_python() -> None:
    """Refuse to work for a launcher with another Python; Ray says nothing of it until something cannot be unpickled.

    Raises:
        ValueError: naming both versions.
    """
    here = python_version()
    there = job_metadata().get(PYTHON, here)
    if there != here:
        raise ValueError(
            f"the cluster has Python {here} and the launcher {there}; use one image or environment for both "
            "(`ncsn doctor` shows this side's)"
        )
