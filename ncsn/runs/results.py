"""What each step results in: plain values, as they stand in the store, and a line for people.

The class of a result knows its step, so `read_result(folder, TrainResult)` of `ncsn.runs.record` is all that a reader
of the store needs. Without torch, which launchers may lack.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Self

from pydantic import TypeAdapter

from ncsn.runs.metrics import GRADES, UTILITY, Estimate, read_metrics, shown_reading

DIGEST_SHOWN = 12


@dataclass(frozen=True)
class Result:
    """The result of a step, as `step` names it. Its text is a line for people."""

    step: ClassVar[str]

    @property
    def headline(self) -> str:
        """What a person wants to know first of the run, a sentence; empty for most steps."""
        return ""

    @classmethod
    def of(cls, values: Any) -> Self:
        """The result from its plain values; `pydantic.ValidationError` for those of another version of this program."""
        return TypeAdapter(cls).validate_python(values)

    def plain(self) -> dict[str, Any]:
        """Its values as JSON has them."""
        return asdict(self)


@dataclass(frozen=True)
class IngestResult(Result):
    """The dataset."""

    step = "ingest"

    uri: str  # its folder in the store
    digest: str  # of its content
    counts: dict[str, int]  # images of each split
    created: bool  # False if the store held this content already, so nothing was written
    repeated: int  # images that equal an earlier one of their split
    left_out: int  # test images that equal a training image
    notes: list[str] = field(default_factory=list)  # on images that were converted or left out, for people

    def __str__(self) -> str:
        counts = " + ".join(f"{count:,} {split}" for split, count in self.counts.items())
        same, out = self.repeated, self.left_out
        equal = f", {same:,} repeated, {out:,} left out as equal" if same or out else ""
        return f"{counts} images{equal}, digest {self.digest[:DIGEST_SHOWN]}"


@dataclass(frozen=True)
class SearchResult(Result):
    """What a search found."""

    step = "search"

    uri: str  # folder of the search
    config: str  # URI of the YAML with the best settings, complete, for `ncsn run` and `ncsn train`
    run: str  # name for the run that trains it
    table: str  # URI of the JSON with all trials and everything that was measured
    plots: list[str]  # URIs of PNG files
    objective_name: str  # the metric that was minimized, with extractor and sample count
    objective: float  # of the best trial
    baseline: float | None  # of the config as it stands, after as much training; None if it failed
    values: dict[str, Any]  # of the best trial, by dotted path
    sampler: dict[str, Any]  # reached the objective
    images_seen: int  # training images of the best trial
    trials: list[dict[str, Any]]  # rows: trial, values, status, images_seen, objective, sampler, seconds, reason

    def __str__(self) -> str:
        before = "" if self.baseline is None else f" (original settings: {self.baseline:.4g})"
        return f"{self.objective_name} = {self.objective:.4g}{before}, {len(self.trials)} trials"


@dataclass(frozen=True)
class TrainResult(Result):
    """The result of training."""

    step = "train"

    checkpoint: str  # URI of the last one
    images_seen: int  # by all workers
    loss: float | None  # normalized, at the end (a zero network reads 1); None if there was nothing left to train
    images_per_second: float  # in all attempts, without startup
    seconds: float  # of this call
    dataset: str  # URI
    notes: list[str] = field(default_factory=list)  # for people

    def __str__(self) -> str:
        loss = "" if self.loss is None else f", loss {self.loss:.4f} (share of the noise not predicted)"
        return f"{self.images_seen:,} images{loss}, {self.images_per_second:,.0f} images/s"


@dataclass(frozen=True)
class SampleResult(Result):
    """One set of samples."""

    step = "sample"

    uri: str  # folder of the Parquet shards and their manifest
    grid: str  # URI of a PNG with the first images
    strip: str  # URI of a PNG that shows some images at an even choice of the noise levels
    num_images: int
    nfe: int  # score-network evaluations per image
    seconds: float  # of this call's sampling
    checkpoint: str
    images_per_second: float | None = None  # of those that this call made; None if it made none
    notes: list[str] = field(default_factory=list)  # for people

    def __str__(self) -> str:
        return f"{self.num_images:,} images, {self.nfe:,} network evaluations per image"


@dataclass(frozen=True)
class EvaluateResult(Result):
    """Metrics of one set of samples."""

    step = "evaluate"

    uri: str  # JSON file with everything below
    verdict: str  # a line for people: how many images, how near they are to real ones
    grade: str  # the same as a key of `GRADES`
    metrics: dict[str, float]  # `eval/<metric>_n<num_images>` of the samples
    real_metrics: dict[str, float]  # `eval/real_<metric>_n<images>`: what a perfect model would reach
    fingerprint: str  # of extractor, weights and reference images; metrics of different ones do not compare
    num_images: int
    num_real_images: int
    gate: dict[str, Any]  # the `Measurement` that decides about promotion, as plain values
    audit: dict[str, Any]  # the `Audit` of the samples as plain values; its `copies` can forbid it
    running: list[dict[str, Any]]  # `RunningScore`s as plain values
    notes: list[str]
    # Of a model of classes: `agreement` and `real_agreement`, a line for each class in `table` and `real_table`, see
    # `ncsn.evaluation.class_scores`, the matrix `confusion`, and whether a probe saw the classes (`by_probe`).
    classes: dict[str, Any] | None
    real_images: str  # URI of a PNG of real images, laid out as that of the samples
    neighbors: str  # URI of a PNG of the samples that are nearest to a training image, with these
    confusion: str | None  # URI of a PNG of the matrix

    @property
    def headline(self) -> str:
        return self.verdict

    def __str__(self) -> str:
        return f"{GRADES[self.grade].partition(':')[0]}; Fréchet {shown_reading('fid', read_metrics(self.metrics))}"


@dataclass(frozen=True)
class Arm:
    """Images that classifiers of one kind were trained on, and how good these are, in percent."""

    name: str
    real: int  # images of each pass
    generated: int
    balanced_accuracy: Estimate
    accuracy: Estimate
    macro_f1: Estimate
    recalls: list[Estimate]  # of each class


@dataclass(frozen=True)
class ClassGain:
    """What generated images change in the recall of a class, in percent."""

    name: str
    train: int  # images
    test: int
    gain: Estimate


@dataclass(frozen=True)
class UtilityResult(Result):
    """Whether generated images help to train a classifier."""

    step = "utility"

    uri: str  # JSON file with everything below
    plot: str  # URI of a PNG file
    sentence: str  # for people
    grade: str  # helps, harms or same
    gain: Estimate  # in balanced accuracy, in percent, of real and generated images over real ones, both augmented
    chosen: list[str]  # the arms that were judged, the most often chosen first
    named: list[str]  # classes with a gain that is surely not zero, the largest first
    classes: list[ClassGain]
    arms: list[Arm]
    seeds: int  # classifiers of each arm
    updates: int  # of each classifier
    rate: float
    trials: list[dict[str, Any]]  # that chose both: `rate`, `updates` and `balanced_accuracy`
    checkpoint_digest: str  # of the weights that made the images
    made: int  # images that were generated
    copies: int  # of these, which were left out
    notes: list[str]  # for people

    @property
    def headline(self) -> str:
        return self.sentence

    def __str__(self) -> str:
        return f"{self.gain.signed} points of balanced accuracy: generated images {UTILITY[self.grade]}"


@dataclass(frozen=True)
class RegisterResult(Result):
    """A version in the registry."""

    step = "register"

    model: str
    version: str
    aliases: list[str]  # when the step ended
    promoted: bool  # whether the gate made it champion
    reason: str
    uri: str  # models:/<model>/<version>
    utility: str  # what classifiers say of its images; empty if none was asked

    @property
    def headline(self) -> str:
        return f"The gate: {self.reason}"

    def __str__(self) -> str:
        aliases = ", ".join(self.aliases) or "no alias"
        return f"{self.model} version {self.version} ({aliases})"


@dataclass(frozen=True)
class ReportResult(Result):
    """The HTML file of a report, and its bytes."""

    step = "report"

    uri: str
    size: int

    def __str__(self) -> str:
        return f"{self.size / 1000:,.0f} kB"


@dataclass(frozen=True)
class ExportResult(Result):
    """A data set of generated images."""

    step = "export"

    uri: str  # its folder
    card: str  # URI of its page, Markdown
    counts: dict[str, int]  # images of each class; of all under an empty name, without classes
    made: int  # images that were generated for it
    copies: int  # of these, which were left out
    expected: float  # copies by chance among as many unseen images
    unclear: str  # why copies cannot be told; empty if they can

    def __str__(self) -> str:
        copies = f"{self.copies:,} copies left out, {self.expected:,.1f} expected by chance"
        return f"{sum(self.counts.values()):,} images, {copies}{self.unclear and f'. {self.unclear}'}"


@dataclass(frozen=True)
class SelectResult(Result):
    """The choice among the checkpoints of a run."""

    step = "select"

    uri: str  # JSON file with all candidates
    plot: str  # URI of a PNG file
    checkpoint: str  # URI of a copy of the chosen candidate, to sample from, or of the last one, which stays
    sentence: str  # why
    figure: str  # the metric that was minimized, with extractor and number of samples
    value: float  # of the chosen candidate
    images_seen: int  # by the chosen candidate
    candidates: list[dict[str, Any]]  # of `Weights`, with value, low and high (None: not finite)
    kept: list[str]  # URIs of copies of those that are surely better than the last one, the best first
    notes: list[str] = field(default_factory=list)  # for people

    def __str__(self) -> str:
        return self.sentence
