"""Which extractor an experiment is evaluated with, and how metrics name it."""

from __future__ import annotations

from ncsn.config import Config
from ncsn.config.evaluation import VERSUS, EvaluationConfig
from ncsn.data.format import Manifest
from ncsn.errors import UserError
from ncsn.evaluation.extractors import dinov2, inception
from ncsn.evaluation.extractors.base import Identity
from ncsn.model.classes import BALANCED

LEAST_TEST_IMAGES = 3  # for the uncertainty of a Fréchet distance


def evaluation_of(config: Config, manifest: Manifest) -> EvaluationConfig:
    """How the samples are evaluated, with the extractor that `auto` stands for."""
    return config.evaluation.resolved(num_classes=sum(map(bool, manifest.class_counts["train"])))


def extractor_name(config: Config, manifest: Manifest) -> str:
    """The extractor as metrics name it, without reading its weights."""
    known = pretrained_identity(config.evaluation)
    return named_in_metrics(evaluation_of(config, manifest).extractor if known is None else known.name, config)


def named_in_metrics(extractor: str, config: Config) -> str:
    """The extractor, with the split of the reference unless that is train."""
    split = config.evaluation.reference_split
    return extractor if split == "train" else f"{extractor}{VERSUS}{split}"


def pretrained_identity(evaluation: EvaluationConfig) -> Identity | None:
    """The extractor whose weights come from a file; None for one that is trained on the images."""
    identify = {"inception": inception.identity, "dinov2": dinov2.identity}
    return identify[evaluation.pretrained]() if evaluation.pretrained else None


def classes_in_turn(config: Config) -> int:
    """How many classes the samples show in turn; 1 if they do not."""
    classes = config.data.num_classes
    return classes if classes is not None and config.sampling.label == BALANCED else 1


def require_test_images(config: Config, manifest: Manifest) -> None:
    """Refuse a dataset with fewer test images than its evaluation needs."""
    count, splits = manifest.count("test"), config.evaluation.num_splits
    if evaluation_of(config, manifest).extractor in ("clusters", "dinov2"):  # no score, and so no splits
        if count < LEAST_TEST_IMAGES:
            raise UserError(
                "data.test_fraction",
                f"leaves {count} test images, and the evaluation needs {LEAST_TEST_IMAGES}",
                hint="raise it",
                value=config.data.test_fraction,
            )
    elif count < splits:
        raise UserError(
            "evaluation.num_splits",
            f"the test split has only {count} images",
            hint="lower it or raise data.test_fraction",
            value=splits,
        )
