"""What `make test-cluster` does before it has a cluster."""

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


@pytest.mark.parametrize("image", ["", "ncsn-python", "registry:5000/ncsn-python"])
def test_it_needs_the_name_and_tag_of_an_image(image: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "tests/cluster_live"],
        cwd=ROOT,
        env=os.environ | {"NCSN_IMAGE": image},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert [line for line in done.stderr.splitlines() if line] == [done.stderr.strip()]
    assert "NCSN_IMAGE" in done.stderr and repr(image) in done.stderr


def test_other_targets_do_not_collect_it() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert "cluster_live" in settings["norecursedirs"]


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
