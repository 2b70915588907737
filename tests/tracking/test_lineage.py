"""From any name in the chain to the whole chain."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from refused import refused

from ncsn.tracking.client import connect
from ncsn.tracking.lineage import Link, trace
from ncsn.tracking.mlflow_runs import step_run

DIGEST = "5f" * 32
SAMPLES = {
    "samples.uri": "/store/samples",
    "checkpoint.uri": "/store/checkpoints/images-8",
    "checkpoint.digest": "abcd1234abcd1234",
}


@pytest.fixture(scope="module")
def chain(config) -> str:
    """A pipeline run as its steps record it; the MLflow id of the parent."""
    with step_run(config, run="traced", step="train") as tracked:
        tracked.log_dataset("digits", digest=DIGEST, uri="/store/datasets/digits")
        tracked.set_tags(
            {"ray.job_id": "01000000", "ray.submission_id": "raysubmit_7", "ray.dashboard_url": "http://ray"}
        )
        tracked.set_tags({"checkpoint.uri": SAMPLES["checkpoint.uri"], "checkpoint.images_seen": "8"})
    with step_run(config, run="traced", step="sample") as tracked:
        tracked.set_tags(SAMPLES)
    with step_run(config, run="traced", step="evaluate") as tracked:
        tracked.set_tags({"evaluation.uri": "/store/evaluation.json", "samples.uri": "/store/samples"})
    with step_run(config, run="traced", step="register") as tracked:
        tracked.set_tags({"evaluation.uri": "/store/evaluation.json"})
        client = tracked.client
        client.create_registered_model("traced-model")
        tags = {
            "gate.promoted": "true",
            "gate.reason": "there was no champion",
            "ncsn.checkpoint": "abcd1234abcd1234",
        }
        client.create_model_version("traced-model", "file:///nowhere", run_id=tracked.run_id, tags=tags)
        client.set_registered_model_alias("traced-model", "champion", "1")
    with step_run(config, run="traced", step="report") as tracked:
        tracked.set_tags({"report.uri": "/store/report.html"})
    parent = tracked.parent_run_id
    client.set_tag(parent, "kfp.pipeline_run_id", "kfp-run-1")
    client.set_tag(parent, "kfp.pipeline_run_url", "http://kfp/#/runs/details/kfp-run-1")
    client.set_tag(parent, "mlflow.docker.image.uri", "registry/ncsn@sha256:1")
    return str(parent)


def walk(link: Link) -> Iterator[Link]:
    yield link
    for below in link.links:
        yield from walk(below)


def test_the_chain_has_every_link_with_what_is_new_in_it(config, chain):
    (whole,) = trace(connect(config).client, "models:/traced-model@champion")
    found = {link.kind: link for link in walk(whole)}
    steps = ["step train", "step sample", "step evaluate", "step register"]
    assert list(found) == ["run", *steps, "model version", "step report"]
    assert (whole.id, whole.facts["name"], whole.facts["dataset.digest"]) == (chain, "traced", DIGEST)
    assert (whole.facts["kfp.pipeline_run_id"], len(whole.facts["mlflow.source.git.commit"])) == ("kfp-run-1", 40)
    train = found["step train"].facts
    assert (train["ray.submission_id"], train["ray.dashboard_url"]) == ("raysubmit_7", "http://ray")
    assert train["checkpoint.uri"] == SAMPLES["checkpoint.uri"]
    assert "dataset.digest" not in train, "as above"
    assert SAMPLES.items() <= found["step sample"].facts.items()
    assert found["step report"].facts["report.uri"] == "/store/report.html"
    version = found["model version"]
    assert (version.id, version.asked) == ("models:/traced-model/1", True)
    assert (version.facts["aliases"], version.facts["gate.reason"]) == ("champion", "there was no champion")


@pytest.mark.parametrize(
    ("identifier", "kind"),
    [
        ("traced", "run"),
        ("kfp-run-1", "run"),
        (DIGEST, "run"),
        ("raysubmit_7", "step train"),
        (SAMPLES["checkpoint.uri"], "step train"),
        ("file:///store/checkpoints/images-8", None),
        (DIGEST[:12], None),
        (SAMPLES["checkpoint.digest"], "step sample"),
        ("/store/samples", "step sample"),
        ("models:/traced-model/1", "model version"),
        ("traced-model@champion", "model version"),
    ],
)
def test_any_name_leads_to_the_same_chain_and_is_marked(config, chain, identifier, kind):
    (found,) = trace(connect(config).client, identifier)
    assert found.id == chain
    assert [link.kind for link in walk(found) if link.asked][:1] == ([kind] if kind else [])


def test_the_ids_of_mlflow_and_a_place_in_the_store(config, chain):
    client = connect(config).client
    (whole,) = trace(client, chain)
    register = next(link for link in walk(whole) if link.kind == "step register")
    assert trace(client, register.id)[0].id == whole.id
    assert trace(client, f"{config.storage.root}/runs/traced/checkpoints/images-000000004")[0].id == whole.id


@pytest.mark.parametrize(
    ("identifier", "key"),
    [
        ("nothing", "nothing"),
        ("0" * 32, "0" * 32),
        ("models:/nowhere/1", "models:/nowhere/1"),
        ("models:/traced-model/4", "models:/traced-model/4"),
        ("models:/traced-model@best", "models:/traced-model@best"),
        ("models:/traced-model", "models:/traced-model"),
        ("models:/my model@champion", "models:/my model@champion"),
    ],
)
def test_what_is_unknown_is_one_clear_line(config, chain, identifier, key):
    with refused(key):
        trace(connect(config).client, identifier)
