"""From any name in the chain to the whole chain."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

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
        tracked.set_tags({"ray.submission_id": "raysubmit_7", "checkpoint.uri": SAMPLES["checkpoint.uri"]})
    with step_run(config, run="traced", step="sample") as tracked:
        tracked.set_tags(SAMPLES)
    with step_run(config, run="traced", step="register") as tracked:
        client, tags = tracked.client, {"gate.reason": "there was no champion"}
        client.create_registered_model("traced-model")
        client.create_model_version("traced-model", "file:///nowhere", run_id=tracked.run_id, tags=tags)
        client.set_registered_model_alias("traced-model", "champion", "1")
    client.set_tag(tracked.parent_run_id, "kfp.pipeline_run_id", "kfp-run-1")
    return tracked.parent_run_id


def walk(link: Link) -> Iterator[Link]:
    yield link
    for below in link.links:
        yield from walk(below)


def test_the_chain_has_every_link_with_what_is_new_in_it(config, chain):
    (whole,) = trace(connect(config).client, "models:/traced-model@champion")
    found = {link.kind: link for link in walk(whole)}
    assert list(found) == ["run", "step train", "step sample", "step register", "model version"]
    assert (whole.id, whole.facts["name"], whole.facts["dataset.digest"]) == (chain, "traced", DIGEST)
    assert (whole.facts["kfp.pipeline_run_id"], len(whole.facts["mlflow.source.git.commit"])) == ("kfp-run-1", 40)
    train = found["step train"].facts
    assert (train["ray.submission_id"], train["checkpoint.uri"]) == ("raysubmit_7", SAMPLES["checkpoint.uri"])
    assert "dataset.digest" not in train, "as above"
    assert SAMPLES.items() <= found["step sample"].facts.items()
    version = found["model version"]
    assert version.id == "models:/traced-model/1"
    assert (version.facts["aliases"], version.facts["gate.reason"]) == ("champion", "there was no champion")


def test_any_name_leads_to_the_same_chain(config, chain):
    client = connect(config).client
    (whole,) = trace(client, chain)
    register = next(link for link in walk(whole) if link.kind == "step register")
    for identifier in (
        register.id,
        "traced",
        "kfp-run-1",
        DIGEST[:12],
        "file:///store/checkpoints/images-8",
        f"{config.storage.root}/runs/traced/checkpoints/images-000000004",
        "traced-model@champion",
        "traced-model",
    ):
        assert [found.id for found in trace(client, identifier)] == [chain], identifier
    assert trace(client, "0" * 32) == trace(client, "nothing") == []
