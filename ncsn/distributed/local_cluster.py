"""A Ray cluster for this process and its children: one that is there already, or one of its own."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from ncsn.config import Config

AUTH_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@contextmanager
def ray_cluster(config: Config) -> Iterator[str]:
    """Connect to the cluster at RAY_ADDRESS, or start one on this machine that ends with the block.

    An own cluster listens on loopback only, has the dashboard on and asks for a token made for this run. Its address
    and token stand in the environment meanwhile, so that child processes join it. Ray ties its processes to this one:
    if this process is killed, they end too.

    Yields:
        The address of the cluster.

    Raises:
        ConnectionError: if RAY_ADDRESS is set and no cluster answers there.
    """
    if ray.is_initialized():
        yield ray.get_runtime_context().gcs_address
        return
    address = os.environ.get("RAY_ADDRESS")
    with _environment({} if address else _own_cluster_environment()):
        # Ray reads these three when it starts, and tells nothing else about where it listens.
        if address:
            ray.init(address=address, logging_level=logging.WARNING)
        else:
            ray.init(
                num_cpus=max(os.cpu_count() or 1, _cpus_needed(config)),
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                logging_level=logging.WARNING,
            )
            address = ray.get_runtime_context().gcs_address
            os.environ["RAY_ADDRESS"] = address
        try:
            yield address
        finally:
            ray.shutdown()


def require_resources(config: Config) -> None:
    """Refuse work that the cluster can never start, instead of waiting for ever.

    Raises:
        ValueError: with the arithmetic.
    """
    have = ray.cluster_resources()
    needed = {"CPU": _cpus_needed(config), "GPU": config.compute.num_workers if config.compute.use_gpu else 0}
    for kind, count in needed.items():
        if count > have.get(kind, 0) and not _autoscales():
            raise ValueError(
                f"compute.num_workers = {config.compute.num_workers} needs {count} {kind}s and the cluster has "
                f"{have.get(kind, 0):g}; lower compute.num_workers or compute.cpus_per_worker"
            )


def _cpus_needed(config: Config) -> int:
    return config.compute.num_workers * config.compute.cpus_per_worker


def _autoscales() -> bool:
    """KubeRay's autoscaler announces itself to the head and its workers by this variable."""
    return os.environ.get("RAY_ENABLE_AUTOSCALER_V2") is not None


def _own_cluster_environment() -> dict[str, str]:
    variables = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the only switch that makes every Ray process listen on loopback
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ADDRESS": "",
    }
    if not any(name in os.environ for name in AUTH_VARIABLES):
        variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return variables


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set variables for the block, and put back what stood there."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update({name: value for name, value in variables.items() if value})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
