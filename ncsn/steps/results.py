"""What the module of a step and `execute` exchange, and what each step results in.

A step's `prepare` returns a `Prepared`, whose work gets a `Context` and returns the result: plain values, as they stand
in its record, and a line for people. Without torch, which launchers may lack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ncsn.config import Config
from ncsn.progress import PublishedProgress
from ncsn.report.words import DIGEST_SHOWN, GRADES, UTILITY, read_metrics, shown_gain, shown_reading
from ncsn.runs.folder import RunFolder, read_step

if TYPE_CHECKING:
    from ncsn.tracking.mlflow_runs import StepRun

R = TypeVar("R")
Key = Mapping[str, Any] | None  # what decides a result; None where only the driver of the step knows


@dataclass(frozen=True)
class Context:
    """What the work of a step is given."""

    folder: RunFolder
    progress: PublishedProgress  # ends the work when the launcher of the lease is gone
    tracked: StepRun  # the MLflow run of the step
    lease: str | None  # URI of the launcher's heartbeat
    last_lines: str  # URI for what the workers wrote last, if the step fails


@dataclass(frozen=True)
class Prepared(Generic[R]):
    """A step whose inputs are settled."""

    config: Config
    key: Mapping[str, Any]  # plain values that decide the result
    work: Callable[[Context], R]
    needs: Callable[[R], list[str]] = lambda _: []  # URIs of files without which a result is of no use
    holds: Callable[[R], bool] = lambda _: True  # whether what a result names elsewhere is still there


def stored_result(folder: RunFolder, step: str, key: Key) -> Any:
    """The stored result of a step, if it is of this key; None else."""
    record = read_step(folder, step)
    ours = record.state == "FINISHED" if key is None else record.inputs == key
    return result_type(step)(**record.result) if record.result and ours else None


def result_type(step: str) -> Callable[..., Any]:
    """The dataclass of a step's result."""
    found: Callable[..., Any] = globals()[f"{step.capitalize()}Result"]
    return found


def result_line(step: str, values: Mapping[str, Any]) -> str:
    """A stored result in one line, for people."""
    try:
        return str(result_type(step)(**values))
    except TypeError:
        return "a result of another version of this program"


@dataclass(frozen=True)
class IngestResult:
    """The dataset."""

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
class SearchResult:
    """What a search found."""

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
class TrainResult:
    """The result of training."""

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
class SampleResult:
    """One set of samples."""

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
class EvaluateResult:
    """Metrics of one set of samples."""

    uri: str  # JSON file with everything below
    verdict: str  # a line for people: how many images, how near they are to real ones
    grade: str  # the same as a key of `ncsn.report.words.GRADES`
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

    def __str__(self) -> str:
        return f"{GRADES[self.grade].partition(':')[0]}; Fréchet {shown_reading('fid', read_metrics(self.metrics))}"


@dataclass(frozen=True)
class UtilityResult:
    """Whether generated images help to train a classifier. Figures are in percent, with `value`, `low` and `high`."""

    uri: str  # JSON file with everything below
    plot: str  # URI of a PNG file
    sentence: str  # for people
    grade: str  # helps, harms or same
    gain: dict[str, float]  # in balanced accuracy, of real and generated images over real ones, both with augmentation
    chosen: list[str]  # the arms that were judged, the most often chosen first
    named: list[str]  # classes with a gain that is surely not zero, the largest first
    classes: list[dict[str, Any]]  # `name`, `train` and `test` images, and `gain`
    arms: list[dict[str, Any]]  # `name`, `real` and `generated` images, and the figures of `evaluation.utility.Figures`
    seeds: int  # classifiers of each arm
    updates: int  # of each classifier
    rate: float
    trials: list[dict[str, Any]]  # that chose both: `rate`, `updates` and `balanced_accuracy`
    checkpoint_digest: str  # of the weights that made the images
    made: int  # images that were generated
    copies: int  # of these, which were left out
    notes: list[str]  # for people

    def __str__(self) -> str:
        return f"{shown_gain(self.gain)} points of balanced accuracy: generated images {UTILITY[self.grade]}"


@dataclass(frozen=True)
class RegisterResult:
    """A version in the registry."""

    model: str
    version: str
    aliases: list[str]  # when the step ended
    promoted: bool  # whether the gate made it champion
    reason: str
    uri: str  # models:/<model>/<version>
    utility: str  # what classifiers say of its images; empty if none was asked

    def __str__(self) -> str:
        aliases = ", ".join(self.aliases) or "no alias"
        return f"{self.model} version {self.version} ({aliases})"


@dataclass(frozen=True)
class ReportResult:
    """The HTML file of a report, and its bytes."""

    uri: str
    size: int

    def __str__(self) -> str:
        return f"{self.size / 1000:,.0f} kB"


@dataclass(frozen=True)
class ExportResult:
    """A data set of generated images."""

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
class SelectResult:
    """The choice among the checkpoints of a run."""

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
