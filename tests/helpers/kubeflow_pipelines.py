"""The Kubeflow Pipelines of a cluster, over HTTP, and the Argo Workflows that carry out its runs."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import urllib3
from real_cluster import Resource, exists, forwarded, get

NAMESPACE, SERVICE, PORT = "kubeflow", "ml-pipeline", 8888
ENDED = {"SUCCEEDED", "SKIPPED", "FAILED", "CANCELED"}
_EXECUTOR = re.compile(r"\.([\w-]+)(?:\(\d+\))?\.executor(?:\(\d+\))?$")
_HTTP = urllib3.PoolManager(retries=urllib3.Retry(3, backoff_factor=1), timeout=30)


@dataclass(frozen=True)
class Kubeflow:
    """Kubeflow Pipelines without users, whose runs are in the namespace `kubeflow`."""

    endpoint: str

    def run(self, run_id: str) -> Resource:
        return self._ask("GET", f"runs/{run_id}")

    def terminate(self, run_id: str) -> None:
        """What the button Terminate does."""
        self._ask("POST", f"runs/{run_id}:terminate")

    def terminate_all(self, name: str) -> list[str]:
        """Terminate the unfinished runs of this name among the latest fifty; their identifiers."""
        runs = self._ask("GET", "runs?page_size=50&sort_by=created_at%20desc").get("runs", [])
        over = ENDED | {"CANCELING"}  # which it refuses to terminate twice
        at_work = [run["run_id"] for run in runs if run["display_name"] == name and run["state"] not in over]
        for run_id in at_work:
            self.terminate(run_id)
        return at_work

    def workflow(self, run_id: str) -> Resource:
        selector = f"pipeline/runid={run_id}"
        (found,) = get("workflows.argoproj.io", "--namespace", NAMESPACE, "--selector", selector)["items"]
        workflow: Resource = found
        return workflow

    def worked_tasks(self, run_id: str) -> set[str]:
        """Names of the pipeline's tasks whose container ran; of what KFP's cache had, none does.

        Argo 4.0.5 calls the pod `WORKFLOW.root(0).train(0).executor(0)`, without the numbers where nothing is retried.
        """
        nodes = self.workflow(run_id)["status"]["nodes"].values()
        names = (node["name"] for node in nodes if node["type"] == "Pod")
        return {found[1] for name in names if (found := _EXECUTOR.search(name))}

    def _ask(self, method: str, path: str) -> Resource:
        response = _HTTP.request(method, f"{self.endpoint}/apis/v2beta1/{path}")
        assert response.status == 200, f"{method} {path}: {response.status} {response.data.decode()[:500]}"
        answer: Resource = json.loads(response.data or b"{}")
        return answer


@contextlib.contextmanager
def find_kubeflow() -> Iterator[Kubeflow | None]:
    """That at KF_PIPELINES_ENDPOINT, or the one in the namespace `kubeflow`, or None."""
    if endpoint := os.environ.get("KF_PIPELINES_ENDPOINT"):
        yield Kubeflow(endpoint.rstrip("/"))
    elif exists("service", SERVICE, "--namespace", NAMESPACE):
        with forwarded(NAMESPACE, SERVICE, PORT) as address:
            yield Kubeflow(f"http://{address}")
    else:
        yield None
