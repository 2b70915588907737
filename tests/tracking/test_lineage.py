"""From any name in the chain to the whole chain."""

from __future__ import annotations

from ncsn.tracking.lineage import trace
from ncsn.tracking.mlflow_runs import step_run


def test_any_name_leads_to_the_same_chain(config):
    with step_run(config, run="traced", step="train") as tracked:
        tracked.log_dataset("digits", digest="5f" * 32, uri="/store/datasets/digits")
        tracked.set_tags({"checkpoint.uri": "/store/checkpoints/images-8"})
    with step_run(config, run="traced", step="register") as tracked:
        client = tracked.client
        client.create_registered_model("traced-model")
        client.create_model_version("traced-model", "file:///nowhere", run_id=tracked.run_id)
        client.set_registered_model_alias("traced-model", "champion", "1")
    client.set_tag(tracked.parent_run_id, "kfp.pipeline_run_id", "kfp-run-1")
    for identifier in (
        tracked.run_id,
        "traced",
        "kfp-run-1",
        "5f" * 6,
        "file:///store/checkpoints/images-8",
        f"{config.storage.root}/runs/traced/checkpoints/images-000000004",
        "traced-model@champion",
        "traced-model",
    ):
        (whole,) = trace(client, identifier)
        assert whole.id == tracked.parent_run_id, identifier
    assert [link.kind for link in whole.links] == ["step train", "step register"]
    assert whole.facts["dataset.digest"] == "5f" * 32
    assert "dataset.digest" not in whole.links[0].facts, "as above"
    (version,) = whole.links[1].links
    assert (version.id, version.facts["aliases"]) == ("models:/traced-model/1", "champion")
    assert trace(client, "0" * 32) == trace(client, "nothing") == []
