"""Steps on other machines: as jobs of a Ray cluster, or as RayJobs on Kubernetes."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from ncsn.config.compute import ComputeConfig

if TYPE_CHECKING:
    from ncsn.remote.backend import Backend


def open_backend(compute: ComputeConfig, *, namespace: str | None = None) -> Backend | None:
    """The backend that `compute.backend` names; None for the local one, which is this process.

    `namespace` is the default of `compute.kuberay.namespace`.
    """
    if compute.backend == "local":
        return None
    if compute.backend == "ray-jobs":
        from ncsn.remote.ray_jobs import RayJobs

        return RayJobs(compute)
    if compute.backend == "kuberay":
        from ncsn.remote.kuberay import KubeRay

        return KubeRay(compute, namespace=namespace)
    assert_never(compute.backend)
