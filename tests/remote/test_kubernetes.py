"""The Kubernetes API through an outage, without a right, and without a cluster: each is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from refused import refused

from ncsn.remote import kuberay
from ncsn.remote.kubernetes import KubernetesApi


def test_an_api_server_that_stays_away_is_one_line(emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    emulation.cluster.away = True
    monkeypatch.setattr(kuberay, "PATIENCE_SECONDS", 1)
    with pytest.raises(ConnectionError, match=r"\b1 s\b") as caught:
        emulation.execute()
    assert KubernetesApi().server in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "ask", [lambda api: api.find("pods"), lambda api: api.get("workflows", "gone"), lambda api: api.read_log("gone")]
)
def test_an_answer_that_is_cut_is_asked_for_again(emulation, capsys: pytest.CaptureFixture[str], ask: Any) -> None:
    emulation.cluster.cut_answers = 1
    assert not ask(KubernetesApi())
    assert "unavailable" in capsys.readouterr().err
    emulation.cluster.cut_answers = 1
    with pytest.raises(ConnectionError):
        ask(KubernetesApi(patience=0))


@pytest.mark.parametrize("verb", ["create", "get", "watch", "delete"])
def test_a_missing_right_is_named(emulation, verb: str) -> None:
    emulation.cluster.on_create = lambda _: emulation.reach("succeeded" if verb == "delete" else "runs")
    rayjobs, *others = emulation.cluster.rules
    emulation.cluster.rules = [rayjobs | {"verbs": [each for each in rayjobs["verbs"] if each != verb]}, *others]
    with pytest.raises(PermissionError, match=rf"'{verb}' on rayjobs in namespace 'kubeflow'"):
        emulation.execute()


def test_no_cluster_at_all_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with refused("KUBECONFIG") as caught:
        KubernetesApi()
    for content in (b"\xff", b"a: [1", b"a: 2020-13-45"):
        (tmp_path / "none").write_bytes(content)
        with refused("KUBECONFIG"):
            KubernetesApi()
    assert "compute." not in caught.value.problems[0].hint  # `ncsn cleanup` has no config
