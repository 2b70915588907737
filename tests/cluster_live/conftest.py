"""A real cluster, `infra/` on it under other names, and a namespace for each test: what `make test-cluster` runs.

KUBECONFIG names the cluster, NCSN_IMAGE the image of all pods, NCSN_SLIM_IMAGE that of those that need no torch, if it
is another. What a failed test leaves to see is in the folder that NCSN_EVIDENCE names, by default cluster-evidence.
NCSN_PATIENCE is a factor of all limits of time, by default 1.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from installed_infra import ENVIRONMENT, Infra, image_under_test, reached
from live import (
    NAMESPACE,
    PATIENCE,
    ROOT,
    Commands,
    KubectlFailed,
    Kubeflow,
    Namespace,
    Place,
    describe_versions,
    exists,
    find_kubeflow,
    kubectl,
    new_namespace,
    require_cluster,
)

EVIDENCE = Path(os.environ.get("NCSN_EVIDENCE", ROOT / "cluster-evidence"))
FAILED = pytest.StashKey[bool]()
OURS = ("rayjobs.ray.io", "rayclusters.ray.io", "workflows.argoproj.io")


def pytest_configure() -> None:
    try:
        image_under_test()
        require_cluster()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_report_header() -> list[str]:
    return [
        f"cluster: {require_cluster()}",
        *describe_versions(),
        f"image: {image_under_test()}",
        f"evidence of failures: {EVIDENCE}",
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First what all others rely on, last what takes longest, and each as long as a busy cluster needs."""
    order = ("test_infra", "test_start", "test_training", "test_evaluation", "test_serving", "test_ending")
    order += ("test_kueue", "test_pipelines")
    ours = [item for item in items if item.path.parent == Path(__file__).parent]
    for item in ours:
        (limit,) = item.iter_markers("timeout")
        item.add_marker(pytest.mark.timeout(limit.args[0] * PATIENCE), append=False)
    items[:] = [item for item in items if item not in ours] + sorted(ours, key=lambda item: order.index(item.path.stem))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Tell the fixtures, while the cluster still has what the test made, that it failed."""
    report = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
    return report


@pytest.fixture(scope="session")
def infra(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Infra]:
    """The overlay standalone with servers of this session, all ready."""
    name = f"ncsn-live-{secrets.token_hex(3)}"
    infra = Infra(tmp_path_factory.mktemp("infra"), system=f"{name}-system", pipelines=name)
    with new_namespace(infra.system, labels={}), new_namespace(name):
        try:
            infra.make_secrets()
            infra.apply("standalone")
            infra.wait_for_servers()
        except BaseException:
            save_evidence(EVIDENCE / "infra", infra.system)
            raise
        yield infra


@pytest.fixture(scope="session")
def home(infra: Infra, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The namespace of the overlay standalone, for tests that leave no pod in it."""
    with _place(infra.pipelines, tmp_path_factory.mktemp("home")) as place:
        yield place


@pytest.fixture(scope="session")
def dataset(home: Place) -> str:
    """URI of the digits in the store."""
    command = home.commands.run("ingest", "--json", *home.options(), "--run", "data", seconds=180)
    return str(command.result()["uri"])


@pytest.fixture
def place(infra: Infra, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A namespace for one test, with all of the overlay standalone but the servers."""
    name = f"{infra.pipelines}-{secrets.token_hex(2)}"
    with new_namespace(name):
        infra.for_namespace(name, tmp_path / "infra").apply_without_servers()
        with _place(name, tmp_path) as place:
            yield place
            if request.node.stash.get(FAILED, False):
                _save(request.node.name, place, infra.system)


@pytest.fixture(scope="session")
def kubeflow() -> Iterator[Kubeflow]:
    """The cluster's Kubeflow Pipelines."""
    with find_kubeflow() as found:
        if found is None:
            pytest.skip("the cluster has no Kubeflow Pipelines, and KF_PIPELINES_ENDPOINT names none")
        yield found


@pytest.fixture(scope="session")
def prepared(
    kubeflow: Kubeflow, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Its namespace made ready for our pipelines, unless it is."""
    if exists("configmap", ENVIRONMENT, "--namespace", NAMESPACE):
        yield
        return
    infra: Infra = request.getfixturevalue("infra")
    ours = infra.for_namespace(NAMESPACE, tmp_path_factory.mktemp("kubeflow"))
    kubectl("label", "namespace", NAMESPACE, "ncsn.dev/pipelines=true", "--overwrite")
    try:
        ours.apply_without_servers()
        yield
    finally:
        ours.remove_without_servers()


@pytest.fixture
def pipelines(prepared: None, kubeflow: Kubeflow, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """The namespace of Kubeflow's runs."""
    with _place(NAMESPACE, tmp_path, KF_PIPELINES_ENDPOINT=kubeflow.endpoint) as place:
        yield place
        if request.node.stash.get(FAILED, False):
            _save(request.node.name, place)
        kubeflow.terminate_all(place.folder)


@contextlib.contextmanager
def _place(namespace: str, folder: Path, **variables: str) -> Iterator[Place]:
    with reached(namespace) as environment:
        environment |= variables
        commands = Commands(folder / f"live-{secrets.token_hex(3)}", environment)
        yield Place(Namespace(namespace), environment, commands)


def _save(test: str, place: Place, *others: str) -> None:
    folder = EVIDENCE / test
    for namespace in (place.namespace.name, *others):
        save_evidence(folder, namespace)
    place.commands.copy_to(folder / "commands")


def save_evidence(folder: Path, namespace: str) -> None:
    """Write the objects and events of the namespace, and the logs of all containers, to `folder/NAMESPACE`."""
    folder = folder / namespace
    folder.mkdir(parents=True, exist_ok=True)
    where = ("--namespaces", namespace, "--output-directory", str(folder), "--output", "yaml")
    for name, command in (
        ("dump.txt", ("cluster-info", "dump", *where)),
        ("pods.txt", ("get", "pods", "--output=wide", "--namespace", namespace)),
        *((f"{kind}.yaml", ("get", kind, "--output=yaml", "--namespace", namespace)) for kind in OURS),
    ):
        try:
            (folder / name).write_text(kubectl(*command, seconds=120))
        except KubectlFailed as error:  # a kind that the cluster lacks, or no answer
            (folder / name).write_text(f"{error}\n")
