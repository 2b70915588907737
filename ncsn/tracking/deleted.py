"""What MLflow still needs, and the files of what was deleted there, which MLflow keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ncsn.tracking.client import tag_filter

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.store.artifact.artifact_repo import ArtifactRepository
    from mlflow.tracking import MlflowClient


def every_version(client: MlflowClient) -> list[ModelVersion]:
    """All versions of all models."""
    return list(_pages(lambda token: client.search_model_versions(page_token=token)))


def knows_run(client: MlflowClient, run_id: str) -> bool:
    """Whether MLflow has this run, deleted or not."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(run_id and client.get_run(run_id))
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def deleted_artifacts(client: MlflowClient, root: str, versions: Sequence[ModelVersion]) -> Iterator[tuple[str, int]]:
    """URI and bytes of the artifacts of each deleted run of the store at `root`, and of models that it logged.

    Those of `versions` are left out.
    """
    from mlflow.entities import ViewType

    runs, sources = {version.run_id for version in versions}, {version.source for version in versions}
    experiments = [each.experiment_id for each in client.search_experiments(view_type=ViewType.ALL)]
    query, deleted = tag_filter({"ncsn.root": root}), ViewType.DELETED_ONLY
    for run in _pages(lambda token: client.search_runs(experiments, query, deleted, page_token=token)):
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


def _pages(search: Callable[[str | None], Any]) -> Iterator[Any]:
    page = search(None)
    yield from page
    while page.token:
        page = search(page.token)
        yield from page
