"""`ncsn init`: the first config and its picture, from images or from an example."""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ncsn import storage
from ncsn.config.load import EXAMPLES
from ncsn.core.images import eight_bit
from ncsn.data.dataset import write_dataset
from ncsn.data.duplicates import DUPLICATES, Duplicate, equal_pairs, in_two_classes, pairs_of, to_csv
from ncsn.data.format import equal_in_words, image_hashes
from ncsn.data.samples import grid_png
from ncsn.data.sources import open_source
from ncsn.data.sources.image_folder import how_to_convert, in_words
from ncsn.errors import MISSING, NotFound, UserError
from ncsn.evaluation.audit import near_duplicates
from ncsn.init import choose
from ncsn.init.choose import FirstConfig
from ncsn.init.plan import Machine
from ncsn.init.survey import Survey, percent, survey
from ncsn.progress import Progress
from ncsn.report.images import evenly_spread
from ncsn.report.words import duration, slowdown, takes

REALISTIC = "faces yes; text, flags and clocks no"  # mirrored images
_NAMED = 3  # classes


@dataclass(frozen=True)
class Questions:
    """What may be shown to somebody and asked meanwhile; nobody answers by default."""

    looking: Callable[[], AbstractContextManager[Progress | None]] = nullcontext
    left_out: Callable[[str], bool] = lambda _: False  # these classes, in words
    mirrored: Callable[[bytes, bool], bool] | None = None  # of a picture, whether mirroring is right, as measured


@dataclass(frozen=True)
class Written:
    """The written files, and what they come from; the copy of an example has neither survey nor choices."""

    config: Path
    example: str = ""
    picture: Path | None = None
    found: Survey | None = None
    chosen: FirstConfig | None = None
    duplicates: tuple[Duplicate, ...] = ()
    unasked: bool = False  # whether mirroring was decided by what was measured alone

    @property
    def lines(self) -> Iterator[tuple[str, str]]:
        """For a person: a word, which may be empty, and a text."""
        if self.found and self.chosen:
            yield "found", _what(self.found)
            yield from (("", detail) for detail in _details(self.found, self.chosen, self.duplicates))
            yield "chose", ", ".join(_choices(self.found, self.chosen))
            if self.chosen.larger:
                yield "", f"{self.chosen.larger}: --set data.image_size, or more --minutes"
            below = ", and below mirrored" if self.chosen.config.data.horizontal_flip else ""
            yield "wrote", f"{self.config} with the reasons, and {self.picture}: what training will see{below}"
            if self.duplicates:
                yield "", f"{_duplicates_file(self.config)}, the names of equal and of nearly equal images"
            seconds, machine = self.chosen.seconds, Machine.here()
            steps = ", ".join(f"{step} {duration(value)}" for step, value in seconds.items())
            total = sum(seconds.values())
            on_cores = takes(total, times=slowdown(machine.cores))
            yield "estimate", f"{f'{duration(total)} on this machine' if machine.gpus else on_cores}: {steps}"
            if self.chosen.warning:
                yield "warning", self.chosen.warning
        else:
            yield "wrote", f"{self.config}, a copy of the example {self.example}: nothing here has that name"
        yield "next", f"ncsn run --config {self.config}"
        if self.chosen and self.unasked:
            mirrors = self.chosen.config.data.horizontal_flip
            how = f"--set data.horizontal_flip={str(not mirrors).lower()} {'unless' if mirrors else 'if'} they are"
            yield "mirrored", f"{'yes' if mirrors else 'no'}, and nobody was asked: {how} realistic ({REALISTIC})"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        if not (self.found and self.chosen):
            return {"config": str(self.config)}
        return {
            "config": str(self.config),
            "picture": str(self.picture),
            "found": [_what(self.found), *_details(self.found, self.chosen, self.duplicates)],
            "duplicates": str(_duplicates_file(self.config)) if self.duplicates else None,
            "reasons": {path: reason for path, reason in self.chosen.draft.reasons.items() if reason},
            "seconds": self.chosen.seconds,
            "slowdown": slowdown(Machine.here().cores),
            "larger": self.chosen.larger,
            "unasked": ["data.horizontal_flip"] if self.unasked else [],
            "warning": self.chosen.warning,
        }


def is_example(place: str) -> bool:
    """Whether nothing is at `place`, so that it can only name an example."""
    if "://" in place:
        return False
    try:
        return not (place and Path(place).expanduser().exists())
    except (OSError, RuntimeError):  # too long for a name, or ~ and no user
        return True


def copy_example(name: str, out: str | None, *, given: str = "") -> Written:
    """Write an example to `out`, by default its name; refuse a `given` option that only images have."""
    examples = sorted(path.stem for path in EXAMPLES.glob("*.yaml"))
    if name not in examples:
        others = "" if "/" in name else f", or an example: {', '.join(examples)}"
        raise NotFound("PLACE", "does not exist", hint=f"give the folder of your images{others}", value=name)
    if given:
        raise UserError(given, "an example is copied as it is", hint="edit the copy, or pass --set to `ncsn run`")
    file = _config_file(out or f"{name}.yaml")
    _write_new(file, (EXAMPLES / f"{name}.yaml").read_bytes())
    return Written(file, name)


def from_images(
    place: str, out: str | None, *, seconds: float, overrides: Sequence[str], questions: Questions
) -> Written:
    """Look at images, choose every setting for a run of about `seconds`, and write the config and a picture.

    The default of `out` is the name of the experiment.
    """
    names = [value for key, _, value in (text.partition("=") for text in overrides) if key == "name" and value]
    file = _config_file(out or f"{(names or [choose.slug(place)])[-1]}.yaml")
    picture = file.with_suffix(".png")
    for each in (picture, _duplicates_file(file)):
        storage.require_output("--out", str(each))

    def look(overrides: Sequence[str]) -> Survey:
        with questions.looking() as progress:
            return survey(place, overrides=overrides, progress=progress)

    def ask_mirrored(images: npt.NDArray[np.uint8], measured: bool) -> bool:  # noqa: FBT001 - as `AskMirrored`
        if questions.mirrored is None:
            unasked.append(measured)
            return measured
        return questions.mirrored(_seen(images, rows=2, columns=4), measured)

    unasked: list[bool] = []
    try:
        found = look(overrides)
        small = choose.small_classes(found)
        if small and found.source == "image_folder" and questions.left_out(in_words(small)):
            overrides = [*overrides, f"data.leave_out={json.dumps(list(small))}"]
            found = look(overrides)
        chosen = choose.choose(
            found,
            seconds=seconds,
            overrides=overrides,
            machine=Machine.here(),
            ask_mirrored=ask_mirrored,
        )
        duplicates = tuple(_duplicates(chosen))
        equal = sum(each.kind == "equal" for each in duplicates)
        if found.complete and 2 * equal >= len(chosen.images):
            data = chosen.config.data
            with tempfile.TemporaryDirectory(prefix="ncsn-") as folder:
                write_dataset(open_source(data), folder, name=data.source, data=data)  # or refuse so few contents
    except UserError as error:
        raise type(error).of(
            replace(each, value=place) if (each.key, each.value) == ("PLACE", MISSING) else each
            for each in error.reworded({"data.root": "PLACE"}).problems
        ) from error
    heading = [
        f"Written by `ncsn init` for {_what(found)}.",
        f"`ncsn show-config --config {file.name}` explains every setting, also those that are not here.",
    ]
    images = eight_bit(chosen.images, chosen.config.data.pixels.limits)
    grid = _seen(images, mirrored=chosen.config.data.horizontal_flip)
    _write_new(file, chosen.draft.to_yaml(heading).encode())
    _write_new(picture, grid)
    if duplicates:
        _write_new(_duplicates_file(file), to_csv(duplicates).encode())
    return Written(file, picture=picture, found=found, chosen=chosen, duplicates=duplicates, unasked=bool(unasked))


def _duplicates(chosen: FirstConfig) -> Iterator[Duplicate]:
    """Images of the sample that are equal, or nearly so, as training sees them; the nearest of the latter first."""
    data, names = chosen.config.data, chosen.names
    pairs = {"equal": equal_pairs(hashes := image_hashes(chosen.images))}
    if data.mirrors:
        either = equal_pairs(np.minimum(hashes, image_hashes(chosen.images[:, :, ::-1])))
        pairs["mirrored"] = either[~np.isin(either[:, 1], pairs["equal"][:, 1])]
    pairs["near"] = near_duplicates(eight_bit(chosen.images, data.pixels.limits), mirrors=data.mirrors)
    for kind, found in pairs.items():
        yield from pairs_of(kind, *([names[row] for row in rows] for rows in found.T))


def _seen(images: npt.NDArray[np.uint8], *, rows: int = 4, columns: int = 8, mirrored: bool = True) -> bytes:
    """A PNG file of images [N, H, W, C] as training sees them, and below them, if it mirrors, the same mirrored."""
    seen = images[evenly_spread(len(images), most=rows * columns // (1 + mirrored))]
    return grid_png(np.concatenate([seen, seen[:, :, ::-1]]) if mirrored else seen, columns=columns)


def _config_file(name: str) -> Path:
    file = Path(name)
    if file.suffix not in (".yaml", ".yml"):
        raise UserError("--out", "is no name of a config", hint="use one that ends in .yaml", value=name)
    storage.require_output("--out", name)
    return file


def _duplicates_file(config: Path) -> Path:
    return config.with_suffix(f".{DUPLICATES}")


def _write_new(file: Path, content: bytes) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("xb") as stream:
            stream.write(content)
    except OSError as error:
        raise UserError("--out", f"cannot be written: {error.strerror}", value=str(file)) from error


def _what(found: Survey) -> str:
    kinds = ", ".join(kind for kind, _ in found.kinds.most_common())
    sizes = sorted({look.size for look in found.looks}, key=lambda size: size[0] * size[1])
    size = " to ".join(f"{width}x{height}" for width, height in dict.fromkeys((sizes[0], sizes[-1])))
    sample = "" if found.complete else f" ({found.looked_at:,} of them looked at)"
    names, classes = found.class_names, ""
    if len(names) > 1:
        more = ", ..." if len(names) > _NAMED else ""
        classes = f", {len(names)} classes ({', '.join(names[:_NAMED])}{more})"
    return f"{found.num_images:,} images in {found.root}{sample}: {kinds}, {size} pixels{classes}"


def _details(found: Survey, chosen: FirstConfig, duplicates: Sequence[Duplicate]) -> Iterator[str]:
    gray, clear = found.share("gray"), found.share("transparent")
    bands, _ = found.bands.most_common(1)[0]
    if bands in (1, 3):
        yield "all gray" if gray == 1 else f"{percent(1 - gray)} in color"
    else:
        yield f"{bands} channels"
    if clear:
        yield f"{percent(clear)} with transparent pixels"
    if converted := found.conversions:
        yield "converted: " + ", ".join(f"{count:,} {kind}" for kind, count in converted.items())
    if found.bad:
        yield f"{len(found.bad):,} cannot be used, such as {found.bad[0].name}: {found.bad[0].reason}"
    if len(found.class_names) > 1:
        least, most = min(found.class_counts), max(found.class_counts)
        yield f"{least:,} to {most:,} images of a class" if least < most else f"{most:,} images of each class"
    if small := choose.small_classes(found):
        how = "; data.leave_out leaves them out" if found.source == "image_folder" else ""
        yield f"too few to learn a class: {in_words(small)}{how}"
    if found.unlabeled:
        yield f"{found.unlabeled:,} without a label"
    if found.ignored:
        yield ": ".join(filter(None, (f"ignored {in_words(found.ignored)}", how_to_convert(found.ignored))))
    kinds = Counter(each.kind for each in duplicates)
    if count := kinds["equal"]:
        yield equal_in_words({"decoded": count}, {"decoded": len(chosen.images)})
    if count := kinds["mirrored"]:
        yield f"{count:,} equal the mirror image of another"
    if count := kinds["near"]:
        one = next(each for each in duplicates if each.kind == "near")
        yield f"{count:,} pairs nearly equal, such as {one.path} and {one.other_path}: remove one of each pair"
    if different := in_two_classes(duplicates):
        yield different
    fraction = chosen.config.data.test_fraction
    test, enough = found.num_images - found.train_images(fraction), choose.ENOUGH_TEST_IMAGES
    if test < enough:
        more = math.ceil(100 * enough / found.num_images) / 100
        how = f"; --set data.test_fraction={more:g} holds out {int(more * found.num_images):,}"
        can_more = found.own_train is None and fraction < more <= 0.5
        yield f"{test:,} test images may be too few to tell how close samples are to real{how * can_more}"


def _choices(found: Survey, chosen: FirstConfig) -> Iterator[str]:
    data = chosen.config.data
    height, width, channels = data.stored_shape
    yield f"{width}x{height} " + {1: "gray", 3: "RGB"}.get(channels, f"of {channels} channels")
    if data.dtype != "uint8":
        low, high = data.pixels.limits
        yield f"{data.dtype} from {low:g} to {high:g}"
    yield "mirrored too" if data.horizontal_flip else "not mirrored"
    if found.square < 1 and height == width:
        yield f"fit {data.fit}"
    if data.background != "none":
        yield f"background {data.background}"
    if len(found.class_names) > 1:
        yield "classes unused" if data.num_classes is None else "by class"
    yield f"extractor {chosen.config.evaluation.extractor}"
