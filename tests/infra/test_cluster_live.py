"""What `make test-cluster` does before it has a cluster, and that nothing else starts it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from installed_infra import Infra

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / ".github" / "workflows" / "test-cluster.yaml"


def collect(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "--quiet", *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in {"NCSN_IMAGE", "KUBECONFIG"}}
    return subprocess.run(
        command, cwd=ROOT, env=environment | variables, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("image", ["", "ncsn-python", "registry:5000/ncsn-python"])
def test_it_needs_the_name_and_tag_of_an_image(image: str) -> None:
    done = collect("tests/cluster_live", NCSN_IMAGE=image)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert [line for line in done.stderr.splitlines() if line] == [done.stderr.strip()]
    assert "NCSN_IMAGE" in done.stderr and repr(image) in done.stderr


def test_it_needs_a_cluster_that_answers(tmp_path: Path) -> None:
    cluster = {"name": "none", "cluster": {"server": "http://127.0.0.1:9"}}
    context = {"name": "none", "context": {"cluster": "none"}}
    kubeconfig = {"apiVersion": "v1", "kind": "Config", "current-context": "none"}
    file = tmp_path / "kubeconfig"
    file.write_text(yaml.safe_dump(kubeconfig | {"clusters": [cluster], "contexts": [context]}))
    done = collect("tests/cluster_live", NCSN_IMAGE="ncsn-python:0.1.0", KUBECONFIG=str(file))
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert str(file) in done.stderr


def test_no_other_target_collects_it() -> None:
    others = [f"--ignore={path}" for path in (ROOT / "tests").iterdir() if path.name != "cluster_live"]
    assert collect("tests", "-m", "", *others).returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert settings["testpaths"] == ["tests"]
    makefile = (ROOT / "Makefile").read_text()
    assert re.findall(r"^(\S+):(?:.*\n)(?:\t.*\n)*?\t.*cluster_live", makefile, flags=re.MULTILINE) == ["test-cluster"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_the_copy_of_infra_has_other_namespaces_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCSN_IMAGE", "registry.example:5000/team/ncsn-python:1a2b")
    infra = Infra(tmp_path / "infra", system="a-system", pipelines="b-pipelines")
    command = ["kubectl", "kustomize", str(infra.folder / "overlays" / "standalone")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    resources = list(yaml.safe_load_all(done.stdout))
    places = {each["metadata"].get("namespace", each["metadata"]["name"]) for each in resources}
    assert places == {"a-system", "b-pipelines"}
    assert not re.search(r"\b(ncsn-system|kubeflow)\b", re.sub(r"^\s*#.*", "", done.stdout))
    assert set(re.findall(r"image: (\S*ncsn-python\S*)", done.stdout)) == {os.environ["NCSN_IMAGE"]}
    assert any(each["kind"] == "Namespace" for each in resources)


def test_the_workflow_installs_the_versions_of_the_docs() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text())
    docs = (ROOT / "docs" / "kubernetes.md").read_text()
    assert f"KFP={workflow['env']['KFP']} " in docs
    (job,) = workflow["jobs"].values()
    assert all(version in docs for version in job["strategy"]["matrix"]["kuberay"])
    assert re.search(r"#.*NOT YET RUN", WORKFLOW.read_text())
