"""What MLflow still needs, and the files of what was deleted there, which MLflow keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ncsn.runs.results import SampleResult
from ncsn.tracking.client import tag_filter

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.store.artifact.artifact_repo import ArtifactRepository
    from mlflow.tracking import MlflowClient


def every_version(client: MlflowClient) -> list[ModelVersion]:
    return list(_pages(lambda token: client.search_model_versions(page_token=token)))


def sampled_runs(client: MlflowClient, root: str) -> set[str]:
    """The runs of the store at `root` whose samples this MLflow knows, deleted or not."""
    from mlflow.entities import ViewType

    found = _runs(client, {"ncsn.root": root, "ncsn.step": SampleResult.step}, ViewType.ALL)
    return {run.data.tags.get("ncsn.run", "") for run in found}


def deleted_artifacts(client: MlflowClient, root: str, versions: Sequence[ModelVersion]) -> Iterator[tuple[str, int]]:
    """URI and bytes of the artifacts of each deleted run of the store at `root`, and of models that it logged.

    Those of `versions` are left out.
    """
    from mlflow.entities import ViewType

    runs, sources = {version.run_id for version in versions}, {version.source for version in versions}
    for run in _runs(client, {"ncsn.root": root}, ViewType.DELETED_ONLY):
        if run.info.run_id in runs:
            continue
        models = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
        for uri in (run.info.artifact_uri, *(model.artifact_location for model in models)):
            if uri not in sources and (size := _size(_artifacts(client, uri))):
                yield uri, size


def delete_artifacts(client: MlflowClient, uri: str) -> None:
    _artifacts(client, uri).delete_artifacts()  # type: ignore[no-untyped-call]


def _artifacts(client: MlflowClient, uri: str) -> ArtifactRepository:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return get_artifact_repository(uri, client.tracking_uri, client.tracking_uri)


def _size(artifacts: ArtifactRepository, path: str | None = None) -> int:
    found = artifacts.list_artifacts(path)
    return sum(_size(artifacts, each.path) if each.is_dir else each.file_size or 0 for each in found)


def _runs(client: MlflowClient, tags: dict[str, str], view: int) -> Iterator[Run]:
    from mlflow.entities import ViewType

    experiments = [each.experiment_id for each in client.search_experiments(view_type=ViewType.ALL)]
    return _pages(lambda token: client.search_runs(experiments, tag_filter(tags), view, page_token=token))


def _pages(search: Callable[[str | None], Any]) -> Iterator[Any]:
    page = search(None)
    yield from page
    while page.token:
        page = search(page.token)
        yield from page
