"""Step 5: the EMA weights as a version in MLflow's registry, champion if they beat the present one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ncsn import storage
from ncsn.config import Config
from ncsn.data.format import load_manifest
from ncsn.errors import UserError, shown_value
from ncsn.model import checkpoint as checkpoints
from ncsn.model.averages import sampled_checkpoint
from ncsn.model.checkpoint import SamplingCheckpoint, weights_digest
from ncsn.model.generate import evaluations_per_image, guide_of
from ncsn.report.cards import ModelFacts, model_card
from ncsn.report.facts import cost_line
from ncsn.report.hints import copying_hints, overfitting_hints
from ncsn.report.scores import read_metrics
from ncsn.runs.folder import read_result, run_folder, spent
from ncsn.runs.history import held_out_curves, load_history
from ncsn.steps.step import Step
from ncsn.tracking import registry
from ncsn.tracking.client import client_at, mlflow_errors, shown, tracking_uri
from ncsn.tracking.gate import Evidence, Measurement, Memorization, not_finite
from ncsn.tracking.mlflow_runs import StepRun
from ncsn.tracking.promotion import pass_gate

# Name -> what it shows, of the pictures of the card.
PICTURES = {"grid.png": "samples", "neighbors.png": "samples and their nearest training images"}


@dataclass(frozen=True)
class RegisterResult:
    """A version in the registry."""

    model: str
    version: str
    aliases: list[str]  # when the step ended
    promoted: bool  # whether the gate made it champion
    reason: str
    uri: str  # models:/<model>/<version>


def run(config: Config, *, run: str, checkpoint: str, evaluation: str) -> RegisterResult:
    """Register the checkpoint at the URI `checkpoint` once, judged by the `evaluation` of its samples."""
    step = Step("register", config, run, RegisterResult)
    checkpoint = sampled_checkpoint(checkpoint, config)
    loaded = checkpoints.load_for_sampling(checkpoint)
    config = checkpoints.require_same_training(loaded.config, config, origin=checkpoint)
    config = registry.settle_guide(config, near=step.folder.uri)
    loaded = replace(loaded, config=config, guide=guide_of(loaded, config.sampling))
    measured = storage.read_json(evaluation)
    _require_own_samples(measured, loaded)
    evidence = _evidence(measured, loaded)
    inputs = {
        "checkpoint": loaded.digest,
        **registry.deciding(loaded),
        "evaluation": evaluation,
        "evidence": asdict(evidence),
        "model": config.registered_model,
        "registry": shown(tracking_uri(config)),
    }
    if (result := step.found(inputs, needs=lambda _: [])) and _is_registered(config, result):
        return result
    with step.work(config) as (progress, tracked):
        progress.start(3, "stages")
        candidate = _candidate(tracked, loaded, measured, run=run, checkpoint=checkpoint)
        progress.advance()
        version = registry.register(tracked, candidate)
        progress.advance()
        result = _decide(tracked, candidate.name, str(version.version), evidence)
    return step.done(result)


def _is_registered(config: Config, result: RegisterResult) -> bool:
    """Whether the version is still in the registry."""
    uri = tracking_uri(config)
    with mlflow_errors(uri):
        return bool(
            client_at(uri).search_model_versions(f"name = '{result.model}' and version_number = {result.version}")
        )


def _require_own_samples(measured: dict[str, Any], loaded: SamplingCheckpoint) -> None:
    """Refuse an evaluation of other weights or of another sampler than those to be registered."""
    manifest = storage.read_json(storage.join(measured["samples"], "manifest.json"))
    facts = registry.deciding(loaded)
    wanted = {"checkpoint_digest": loaded.digest, **{name: facts.get(name) for name in registry.DECIDING}}
    for key, value in wanted.items():
        if manifest.get(key) != value:
            raise UserError(
                measured["uri"],
                f"measures samples with {key} = {shown_value(manifest.get(key))}, not {shown_value(value)}",
                hint="sample and evaluate with the checkpoint and settings to be registered",
            )


def _candidate(
    tracked: StepRun, loaded: SamplingCheckpoint, measured: dict[str, Any], *, run: str, checkpoint: str
) -> registry.Candidate:
    name = loaded.config.registered_model
    manifest = load_manifest(measured["dataset"])
    if manifest.digest != loaded.dataset_digest:
        raise UserError(
            measured["uri"],
            f"measures against the dataset {manifest.digest}, but {checkpoint} was trained on {loaded.dataset_digest}",
            hint="evaluate with the dataset that it was trained on",
        )
    tracked.log_dataset(manifest.name, digest=manifest.digest, uri=measured["dataset"])
    origin = {"checkpoint.uri": checkpoint, "checkpoint.digest": loaded.digest}
    tracked.set_tags({**origin, "samples.uri": measured["samples"], "evaluation.uri": measured["uri"]})
    files = _pictures(measured)
    facts = ModelFacts(
        name=name,
        run=run,
        checkpoint=loaded.digest,
        images_seen=loaded.images_seen,
        num_parameters=sum(parameter.numel() for parameter in loaded.network.parameters()),
        nfe=evaluations_per_image(loaded.config),
        cost=cost_line(spent(loaded.config, run=run).values()),
        pictures={shown: file for file, shown in PICTURES.items() if file in files},
        warnings=_warnings(measured, loaded.config, run),
        selection=selection_of(loaded.config, run, checkpoint),
        relative_width=None if loaded.average is None else loaded.average["relative_width"],
    )
    card = model_card(facts, config=loaded.config, manifest=manifest, evaluation=measured)
    tracked.log_bytes(card.encode(), "model_card.md")
    for file, content in files.items():
        tracked.log_bytes(content, file)
    return registry.Candidate(
        name=name,
        checkpoint=loaded,
        card=card,
        files=files,
        metrics={**measured["metrics"], **measured["real_metrics"]},
        tags={
            "ncsn.run": run,
            "ncsn.root": storage.absolute(loaded.config.storage.root),
            "ncsn.checkpoint_uri": checkpoint,
            "dataset.digest": manifest.digest,
            "eval.fingerprint": measured["fingerprint"],
            **({} if loaded.guide is None else {"ncsn.guide": weights_digest(loaded.guide.network)}),
        },
    )


def _pictures(measured: dict[str, Any]) -> dict[str, bytes]:
    """File name -> content of the card's pictures, as far as the evaluation has them."""
    files = {}
    grid = storage.join(measured["samples"], "grid.png")
    if storage.exists(grid):
        files["grid.png"] = storage.read_bytes(grid)
    files["neighbors.png"] = storage.read_bytes(measured["neighbors"])
    return files


def copies_beyond_chance(measured: Mapping[str, Any]) -> str:
    """Numbers of the samples that copy training images, if an evaluation has more than chance explains; else empty."""
    return Memorization(**measured["memorization"]).objection


def selection_of(config: Config, run: str, checkpoint: str) -> Mapping[str, Any] | None:
    """The result of `ncsn select`, if it chose this checkpoint or the one that it copied; None else."""
    record = read_result(run_folder(config, run), "select")
    if record is None:
        return None
    chosen = record.result
    best = chosen["images_seen"], chosen["relative_width"]
    copied = [row["uri"] for row in chosen["candidates"] if (row["images_seen"], row["relative_width"]) == best]
    return chosen if checkpoint in (chosen["checkpoint"], *copied) else None


def _warnings(measured: Mapping[str, Any], config: Config, run: str) -> list[str]:
    held_out = held_out_curves(load_history(run_folder(config, run).history))
    generated, real = read_metrics(measured["metrics"]), read_metrics(measured["real_metrics"])
    return [
        *([] if held_out is None else overfitting_hints(held_out)),
        *copying_hints(generated, real, copies=copies_beyond_chance(measured)),
    ]


def _evidence(measured: dict[str, Any], loaded: SamplingCheckpoint) -> Evidence:
    weights = {name: float(tensor.abs().max()) for name, tensor in loaded.network.named_parameters()}
    broken = not_finite({**measured["metrics"], **measured["real_metrics"], **weights})
    return Evidence(Measurement(**measured["gate"]), Memorization(**measured["memorization"]), tuple(broken))


def _decide(tracked: StepRun, name: str, version: str, evidence: Evidence) -> RegisterResult:
    decision = pass_gate(tracked.client, name=name, version=version, evidence=evidence)
    result = RegisterResult(
        model=name,
        version=version,
        aliases=sorted(tracked.client.get_model_version(name, version).aliases),
        promoted=decision.promoted,
        reason=decision.reason,
        uri=f"models:/{name}/{version}",
    )
    tracked.set_tags(
        {"model.uri": result.uri, "gate.promoted": str(result.promoted).lower(), "gate.reason": result.reason}
    )
    return result
