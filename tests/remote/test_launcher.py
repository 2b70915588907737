"""What a RayJob gets of the environment of whoever starts it."""

from __future__ import annotations

import pytest

from ncsn.remote.backend import environment_for_pods, forwarded_environment

NAMES = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME")


@pytest.mark.parametrize(
    ("address", "reaches_pods"),
    [
        ("http://mlflow.ncsn-system:5000", True),
        ("https://localhost.example.com", True),
        ("http://localhost:5000", False),
        ("http://127.0.0.1:5000", False),
        ("http://[::1]:5000", False),
        ("http://user:word@mlflow:5000", False),
    ],
)
def test_a_port_forward_is_not_handed_to_pods(
    address: str, *, reaches_pods: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_RUN_ID", "abc")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    expected = {"MLFLOW_RUN_ID": "abc"} | ({"MLFLOW_TRACKING_URI": address} if reaches_pods else {})
    assert environment_for_pods() == expected
    assert ("MLFLOW_TRACKING_URI" in forwarded_environment()) == ("@" not in address), (
        "on one machine it is the address"
    )
