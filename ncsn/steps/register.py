"""The EMA weights as a version in MLflow's registry, champion if they beat the present one."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ncsn import storage
from ncsn.config import Config
from ncsn.config.training import ema_setting
from ncsn.data.format import MANIFEST, Manifest, load_manifest
from ncsn.errors import UserError, shown_value, without_users
from ncsn.evaluation import extractor_name
from ncsn.evaluation.copies import Copies
from ncsn.model.checkpoint import TrainedNetwork, weights_digest
from ncsn.model.generate import evaluations_per_image, guide_of, sampling_facts
from ncsn.report.hints import copying_hints, overfitting_hints
from ncsn.report.images import smaller_png
from ncsn.report.pages import plain, render
from ncsn.report.words import cost_line, terms
from ncsn.runs.history import held_out_curves, load_history
from ncsn.runs.layout import RunFolder, run_folder
from ncsn.runs.metrics import metric_name
from ncsn.runs.record import read_finished, read_result, spent
from ncsn.runs.results import RegisterResult, SelectResult, UtilityResult
from ncsn.runs.run import Run
from ncsn.steps.prepared import Context, Prepared
from ncsn.steps.sample import open_checkpoint
from ncsn.tracking import registry
from ncsn.tracking.client import SQLITE, client_at, mlflow_errors, tracking_uri
from ncsn.tracking.gate import Evidence, Floors, Measurement
from ncsn.tracking.mlflow_runs import NOTE
from ncsn.tracking.promotion import pass_gate


def prepare(run: Run, *, checkpoint: str, evaluation: str) -> Register:
    """A checkpoint is registered once, judged by the `evaluation` of its samples."""
    config, loaded = open_checkpoint(run, checkpoint)
    loaded = replace(loaded, config=config, guide=guide_of(loaded, config.sampling))
    measured = storage.absolute_uris(storage.read_json(evaluation), run.folder.root)
    # Not an evaluation of other weights, of another sampler or against other images.
    samples = storage.read_json(storage.join(measured["samples"], MANIFEST))
    facts = registry.deciding(loaded)
    wanted = {"checkpoint_digest": loaded.digest, **{name: facts.get(name) for name in registry.DECIDING}}
    for name, value in wanted.items():
        if samples.get(name) != value:
            reason = f"measures samples with {name} = {shown_value(samples.get(name))}, not {shown_value(value)}"
            hint = "sample and evaluate with the checkpoint and settings to be registered"
            raise UserError(measured["uri"], reason, hint=hint)
    manifest = load_manifest(measured["dataset"])
    if manifest.digest != loaded.dataset_digest:
        other = f"{checkpoint} was trained on {loaded.dataset_digest}"
        reason = f"measures against the dataset {manifest.digest}, but {other}"
        raise UserError(measured["uri"], reason, hint="evaluate with the dataset that it was trained on")
    weights = {name: float(tensor.abs().max()) for name, tensor in loaded.network.named_parameters()}
    values = {**measured["metrics"], **measured["real_metrics"], **weights}
    not_finite = tuple(name for name, value in values.items() if not math.isfinite(value))
    floors, images = config.tracking.require.model_dump(exclude_none=True), config.sampling.num_images
    if floors:
        floors["figure"] = metric_name("fid", extractor=extractor_name(config, manifest), num_images=images)
    measurement, copies = Measurement(**measured["gate"]), Copies(**measured["audit"]["copies"])
    helped = utility_of(run.folder, loaded.digest, sampling_facts(config.sampling, loaded.guide))
    evidence = Evidence(measurement, copies, not_finite, Floors(**floors), helped.gain.low if helped else None)
    uri = tracking_uri(config)

    key = {
        "checkpoint": loaded.digest,
        **facts,
        "evaluation": evaluation,
        "evidence": asdict(evidence),
        "terms": terms(config.data, manifest),  # of the card
        "promote": config.tracking.promote,
        "model": config.registered_model,
        "registry": without_users(uri).removeprefix(SQLITE),
    }
    return Register(config, key, loaded, measured, manifest, evidence, checkpoint)


@dataclass(frozen=True)
class Register(Prepared[RegisterResult]):
    """Registers the version with its card, then asks the gate."""

    loaded: TrainedNetwork
    measured: Mapping[str, Any]  # the evaluation
    manifest: Manifest  # of the dataset
    evidence: Evidence  # for the gate
    checkpoint: str  # URI

    def work(self, context: Context) -> RegisterResult:
        progress, tracked = context.progress, context.tracked
        progress.start(3, "stages")
        tracked.log_dataset(self.manifest.name, digest=self.manifest.digest, uri=self.measured["dataset"])
        origin = {"checkpoint.uri": self.checkpoint, "checkpoint.digest": self.loaded.digest}
        tracked.set_tags({**origin, "samples.uri": self.measured["samples"], "evaluation.uri": self.measured["uri"]})
        run = context.folder.run
        candidate = _candidate(self.loaded, self.measured, self.manifest, run=run, checkpoint=self.checkpoint)
        tracked.log_file("model_card.md", candidate.card.encode())
        for file, content in candidate.files.items():
            tracked.log_file(file, content)
        progress.advance()
        version = str(registry.register(tracked, candidate).version)
        progress.advance()
        ask = self.config.tracking.promote == "ask"
        decision = pass_gate(tracked.client, name=candidate.name, version=version, evidence=self.evidence, ask=ask)
        # The card of the version says so too, before the use, and what classifiers have said since it was registered.
        told = {"Gate": decision.reason}
        if helped := candidate.tags.get("ncsn.utility"):
            told = {"Utility": plain(helped)} | told
            tracked.client.set_model_version_tag(candidate.name, version, "ncsn.utility", helped)
        card = tracked.client.get_model_version(candidate.name, version).description or ""
        card = re.sub(rf"\n\n({'|'.join(told)}): .*", "", card)
        lines = "".join(f"\n\n{name}: {text}." for name, text in told.items())
        card = card.replace("\n\n## Use\n", f"{lines}\n\n## Use\n", 1)
        before, title, _ = card.partition("\n## License\n")
        if title:  # a long card has no room for it
            card = before + title + candidate.card.rpartition(title)[2]  # terms may have been given since
        # It may be no champion.
        card = card.replace(f"models:/{candidate.name}@champion", f"models:/{candidate.name}/{version}")
        tracked.client.update_model_version(candidate.name, version, card[: registry.DESCRIPTION_LENGTH])
        result = RegisterResult(
            model=candidate.name,
            version=version,
            aliases=sorted(tracked.client.get_model_version(candidate.name, version).aliases),
            promoted=decision.promoted,
            reason=decision.reason,
            uri=f"models:/{candidate.name}/{version}",
            utility=helped or "",
        )
        tags = {"gate.promoted": str(result.promoted).lower(), "gate.reason": result.reason}
        tracked.set_tags({"model.uri": result.uri, **tags})
        aliases = f" ({', '.join(result.aliases)})" if result.aliases else ""
        note = f"{self.measured['verdict']}\n\nModel `{result.uri}`{aliases}: {result.reason}"
        tracked.parent.set_tags({"model.uri": result.uri, NOTE: note})
        return result

    def stands(self, result: RegisterResult) -> bool:
        """The version may have been deleted."""
        uri = tracking_uri(self.config)
        with mlflow_errors(uri):
            wanted = f"name = '{result.model}' and version_number = {result.version}"
            return bool(client_at(uri).search_model_versions(wanted))


def _candidate(
    loaded: TrainedNetwork, measured: Mapping[str, Any], manifest: Manifest, *, run: str, checkpoint: str
) -> registry.Registration:
    config, guide, samples = loaded.config, loaded.guide, measured["samples"]
    helped = utility_of(run_folder(config, run), loaded.digest, sampling_facts(config.sampling, guide))
    pictures = {"grid.png": storage.join(samples, "grid.png"), "neighbors.png": measured["neighbors"]}
    root = run_folder(config, run).root
    files = {file: smaller_png(storage.read_below(root, uri)) for file, uri in pictures.items() if storage.exists(uri)}
    shown_in = {"samples": "grid.png", "samples and their nearest training images": "neighbors.png"}
    held_out = held_out_curves(load_history(run_folder(config, run).history))
    card = render(
        "model_card.md.j2",
        name=config.registered_model,
        registry=without_users(tracking_uri(config)),
        run=run,
        checkpoint=loaded.digest,
        images_seen=loaded.images_seen,
        num_parameters=sum(parameter.numel() for parameter in loaded.network.parameters()),
        nfe=evaluations_per_image(config),
        cost=cost_line(spent(config, run_folder(config, run)).values()),
        pictures={text: file for text, file in shown_in.items() if file in files},
        warnings=[*(overfitting_hints(held_out) if held_out else ()), *copying_hints(measured["audit"])],
        selection=selection_of(config, run, checkpoint),
        average=ema_setting(config.train),
        config=config,
        manifest=manifest,
        evaluation=measured,
        utility=helped.sentence if helped else "",
    )
    return registry.Registration(
        name=config.registered_model,
        checkpoint=loaded,
        card=card,
        files=files,
        metrics={**measured["metrics"], **measured["real_metrics"]},
        tags={
            "ncsn.run": run,
            "ncsn.root": storage.absolute(config.storage.root),
            "ncsn.checkpoint_uri": checkpoint,
            "dataset.digest": manifest.digest,
            "eval.fingerprint": measured["fingerprint"],
            **({} if guide is None else {"ncsn.guide": weights_digest(guide.network)}),
            **({} if helped is None else {"ncsn.utility": helped.sentence}),
        },
    )


def utility_of(folder: RunFolder, digest: str, facts: Mapping[str, Any]) -> UtilityResult | None:
    """What classifiers say of images that these weights make in this way, if they were asked."""
    finished = read_finished(folder, UtilityResult.step)
    if finished is None or not made_alike(finished.key, facts):
        return None
    result: UtilityResult = finished.result
    return result if result.checkpoint_digest == digest else None


def made_alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether these facts of sampling make images of the same distribution."""
    return all(one.get(name) == other.get(name) for name in ("sampler", "guidance", "levels", "grays"))


def selection_of(config: Config, run: str, checkpoint: str) -> SelectResult | None:
    """The result of `ncsn select`, if it chose this checkpoint or the one that it copied; None else."""
    chosen = read_result(run_folder(config, run), SelectResult)
    if chosen is None:
        return None
    copied = [row["uri"] for row in chosen.candidates if row["images_seen"] == chosen.images_seen]
    return chosen if checkpoint in (chosen.checkpoint, *copied) else None
