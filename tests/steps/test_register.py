"""The register step: once is once, and what it leaves in the registry and the run."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from do import do, recorded, result_of
from gated import audited
from refused import refused

from ncsn import storage
from ncsn.config import Config, from_yaml, to_yaml
from ncsn.errors import NotFound
from ncsn.model import checkpoint
from ncsn.model.generate import sampling_facts
from ncsn.report.images import grid_png
from ncsn.runs.layout import RunFolder
from ncsn.tracking import registry
from ncsn.tracking.client import connect
from ncsn.tracking.promotion import promote_version

FIGURE = "eval/classifier_fid_n4"


@pytest.fixture(scope="module")
def dataset(config) -> str:
    return do("ingest", config, "data").uri


@pytest.fixture(scope="module")
def saved(config, root, dataset, save_untrained) -> str:
    save_untrained(config, dataset, root / "checkpoint")
    return str(root / "checkpoint")


@pytest.fixture(scope="module")
def evaluate(config, root, dataset, saved):
    """Writes an evaluation with a chosen figure, as the sample and evaluate steps leave it."""

    loaded, samples = checkpoint.load_checkpoint(saved), str(root / "samples")
    storage.write_bytes(f"{samples}/grid.png", grid_png(np.zeros((4, 8, 8, 1), np.uint8)))
    storage.write_json(f"{samples}/manifest.json", {"checkpoint_digest": loaded.digest, **registry.deciding(loaded)})

    def write(value: float, *, dataset=dataset, name_of_file="", copies=0) -> str:
        figures = result_of(
            "evaluate",
            uri=str(root / f"evaluation-{name_of_file or value}.json"),
            metrics={FIGURE: value},
            real_metrics={"eval/real_classifier_fid_n2": 1.0},
            fingerprint="f" * 64,
            num_images=4,
            verdict="256 images made.",
            neighbors=f"{samples}/grid.png",
            gate={"name": FIGURE, "value": value, "log_std": 0.04, "num_images": 4, "fingerprint": "f" * 64},
            audit=audited(copies),
        )
        storage.write_text(figures["uri"], json.dumps(figures | {"samples": samples, "dataset": dataset}))
        return figures["uri"]

    return write


def test_first_version_is_champion_and_a_second_call_changes_nothing(config, saved, evaluate):
    evaluation = evaluate(5.0)
    first = do("register", config, "one", checkpoint=saved, evaluation=evaluation)
    assert (first.model, first.version, first.uri) == ("ncsn-tiny", "1", "models:/ncsn-tiny/1")
    assert (first.promoted, first.aliases) == (True, ["challenger", "champion"])
    assert do("register", config, "one", checkpoint=saved, evaluation=evaluation) == first
    storage.delete(storage.join(config.storage.root, "runs/one/steps/register/result.json"))
    assert do("register", config, "one", checkpoint=saved, evaluation=evaluation) == first
    client = connect(config).client
    (version,) = client.search_model_versions("name = 'ncsn-tiny'")
    gated = f"Gate: {first.reason}.\n\n## Use"
    assert gated in version.description and version.description.count("Gate: ") == 1
    assert "ncsn.utility" not in version.tags
    for said in ("They help", "They harm"):  # classifiers that are asked later
        low = float(said == "They help")
        told = {
            "checkpoint_digest": checkpoint.load_checkpoint(saved).digest,
            "sentence": said,
            "gain": {"value": 1.0, "low": low, "high": 6.0},
        }
        result, facts = result_of("utility", **told), sampling_facts(config.sampling, None)
        recorded(RunFolder(config.storage.root, "one"), "utility", key=facts, result=result)
        assert do("register", config, "one", checkpoint=saved, evaluation=evaluation).utility == said
    other = result | {"sentence": "By another", "gain": {"value": 5.5, "low": 5.0, "high": 6.0}}
    recorded(RunFolder(config.storage.root, "one"), "utility", key=facts | {"levels": {}}, result=other)
    assert not do("register", config, "one", checkpoint=saved, evaluation=evaluation).utility
    (version,) = client.search_model_versions("name = 'ncsn-tiny'")
    assert version.tags["ncsn.utility"] == said and "help" not in version.description
    assert f"{said}.\n\nGate: " in version.description
    owned = from_yaml(to_yaml(config), overrides=["data.license=CC0", "data.owner=Ada"])
    assert do("register", owned, "one", checkpoint=saved, evaluation=evaluation).version == "1"
    card = client.get_model_version("ncsn-tiny", "1").description
    assert card.endswith("terms: CC0; owner: Ada\n") and card.count("## License") == 1
    run = client.get_run(version.run_id)
    assert (version.tags["ncsn.run"], run.data.tags["ncsn.step"], run.info.status) == ("one", "register", "FINISHED")
    gate = json.loads(version.tags["gate.decision"])
    assert (gate["promoted"], gate["evidence"]["measurement"]["value"]) == (True, 5.0)
    (output,) = run.outputs.model_outputs
    stored = {file.path for file in client.list_logged_model_artifacts(output.model_id)}
    assert {"MLmodel", "model.py", "artifacts", "code", "grid.png", "model_card.md"} <= stored
    assert run.inputs.dataset_inputs[0].dataset.name == "sklearn_digits"


def test_the_code_of_a_card_runs_as_it_is_printed(config, saved, evaluate, tmp_path):
    """In an empty folder, by a process that knows no server, for a version that is no champion."""
    asking = from_yaml(to_yaml(config), overrides=["tracking={registered_model: coded, promote: ask}"])
    do("register", asking, "coded", checkpoint=saved, evaluation=evaluate(5.0))
    card = connect(asking).client.get_model_version("coded", "1").description
    code = "".join(re.findall(r"^```python\n(.*?)^```", card, flags=re.DOTALL | re.MULTILINE))
    command = [sys.executable, "-c", f"{code}print(images.shape, images.dtype)"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "(16, 8, 8, 1) uint8\n", done.stderr
    assert list(tmp_path.iterdir()) == []


def named(config: Config, model: str) -> Config:
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"registered_model": model})})


def test_a_new_figure_at_the_same_place_is_decided_on_and_a_deleted_version_registered_anew(config, saved, evaluate):
    renewed = named(config, "renewed")
    first, second = (
        do("register", renewed, "renewed", checkpoint=saved, evaluation=evaluate(value, name_of_file="same"))
        for value in (9.0, 8.0)
    )
    assert first.reason.startswith("eval/classifier_fid_n4 = 9")
    assert "8.0 (" in second.reason and second.version == first.version == "1"
    connect(renewed).client.delete_model_version("renewed", "1")
    again = do("register", renewed, "renewed", checkpoint=saved, evaluation=evaluate(8.0, name_of_file="same"))
    assert again.version == "2"


def test_copies_are_no_champion(config, saved, evaluate):
    copied = evaluate(1.0, copies=200, name_of_file="copies")
    copies = do("register", named(config, "copies"), "copies", checkpoint=saved, evaluation=copied)
    assert (copies.promoted, copies.aliases) == (False, ["challenger"])
    description = connect(config).client.get_model_version(copies.model, copies.version).description
    assert all("256" in text and " 200 " in text for text in (copies.reason, description))


def test_a_floor_and_a_person_keep_a_version_from_the_alias(config, saved, evaluate):
    settings = ("tracking.registered_model=floors", "tracking.require={fid_below: 5, copies_below: 0.3}")
    strict = from_yaml(to_yaml(config), overrides=settings)
    far = do("register", strict, "floors", checkpoint=saved, evaluation=evaluate(5.0))
    assert (far.promoted, far.aliases) == (False, ["challenger"])
    assert "fid_below = 5" in far.reason
    client = connect(config).client
    assert client.get_model_version("floors", far.version).tags["gate.reason"] == far.reason
    with refused("models:/floors/1"):
        promote_version(client, "floors")
    asking = from_yaml(to_yaml(strict), overrides=["tracking.require.fid_below=5.1", "tracking.promote=ask"])
    asked = do("register", asking, "floors", checkpoint=saved, evaluation=evaluate(5.0))
    assert (asked.version, asked.promoted, asked.aliases) == (far.version, False, ["challenger"])
    assert promote_version(client, "floors").reason.startswith("eval/classifier_fid_n4 = 5")


def test_what_does_not_belong_together_is_refused(config, root, saved, evaluate):
    longer, fewer, other = (
        from_yaml(to_yaml(config), overrides=[each])
        for each in ("sampling.sampler.steps_per_level=4", "data.max_images=10", "noise.num_levels=3")
    )
    evaluation = evaluate(5.0)
    with refused(evaluation) as caught:
        do("register", longer, "mixed", checkpoint=saved, evaluation=evaluation)
    assert "steps_per_level: 2" in str(caught.value) and "steps_per_level: 4" in str(caught.value)
    against_others = evaluate(4.0, dataset=do("ingest", fewer, "fewer").uri)
    with refused(against_others):
        do("register", config, "one", checkpoint=saved, evaluation=against_others)
    with refused(saved, error=checkpoint.CheckpointError) as caught:
        do("register", other, "other", checkpoint=saved, evaluation=evaluation)
    assert "noise.num_levels" in str(caught.value)
    nothing = str(root / "nothing.json")
    with refused(nothing, error=NotFound):
        do("register", config, "none", checkpoint=saved, evaluation=nothing)
