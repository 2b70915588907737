"""The paper's two-dimensional experiments, Figures 2 and 3, from exact and from learned scores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from ncsn import storage
from ncsn.errors import UserError
from ncsn.report.style import INK, PALETTE, new_figure, styled
from ncsn.tools import mixture
from ncsn.tools.mixture import TWO_MODES, ModeReport, PlainScoreMlp

TRUSTED = ((5.0, 5.0, 2.5), (-5.0, -5.0, 2.5))
"""(x, y, half side) of the squares around the modes in which there is data to learn from."""
ARROWS = 17
PIXELS = 128
PLAIN_STEPS = 10_000
CONDITIONAL_STEPS = 2000
"""Optimizer steps; the second is what the weights of the modes need, not the last digits of the score."""


@dataclass(frozen=True)
class ToyResult:
    """What the two experiments measured.

    Attributes:
        uri: JSON file with everything below.
        figure_2: PNG: the exact and the learned score field.
        figure_3: PNG: where plain and annealed Langevin dynamics end.
        true_weight: Share of the mixture at its mode (5, 5).
        weights: Sampler -> share of its points there.
        score_error_near: Squared error of the learned score over the squared exact one, within 2.5 of a mode along
            each axis.
        score_error_elsewhere: The same in the rest of [-8, 8]^2.
        seed: Of networks, data and noise.
    """

    uri: str
    figure_2: str
    figure_3: str
    true_weight: float
    weights: dict[str, float]
    score_error_near: float
    score_error_elsewhere: float
    seed: int


def run(folder: str, *, seed: int = 0) -> ToyResult:
    """Learn the mixture's score, sample with it and with the exact one, and draw both figures.

    Args:
        folder: URI that receives the files.
        seed: The same seed gives the same numbers on one machine.
    """
    from ncsn.report.style import to_png  # matplotlib takes a second, which `ncsn --help` need not wait for

    with _one_thread():
        network = mixture.fit_figure_2(seed=seed, num_steps=PLAIN_STEPS)
        reports = _samples(network, seed=seed)
    panels = {
        name: ModeSample(name, report.points.numpy().astype(float), report.weight) for name, report in reports.items()
    }
    names = list(panels)
    uris = {name: storage.join(storage.absolute(folder), f"{name}.png") for name in ("figure_2", "figure_3")}
    near, elsewhere = _score_errors(network)
    result = ToyResult(
        uri=storage.join(storage.absolute(folder), "toy.json"),
        **uris,
        true_weight=float(TWO_MODES.weights[1]),
        weights={name: round(report.weight, 4) for name, report in reports.items()},
        score_error_near=near,
        score_error_elsewhere=elsewhere,
        seed=seed,
    )
    rows = [[panels[name] for name in names[:3]], [panels[name] for name in names[3:]]]
    storage.write_bytes(result.figure_2, to_png(_figure_2(network)))
    storage.write_bytes(result.figure_3, to_png(mode_samples(rows, truth=result.true_weight)))
    spread = {name: {"mean": report.mean.tolist(), "variance": report.variance} for name, report in reports.items()}
    storage.write_text(result.uri, json.dumps(asdict(result) | {"at_mode_5_5": spread}, indent=1))
    return result


@contextmanager
def _one_thread() -> Iterator[None]:
    """The networks are too small to share, and one thread adds up in the same order on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _samples(network: PlainScoreMlp, *, seed: int) -> dict[str, ModeReport]:
    """Figure 3: its three panels with the exact scores, and two more with learned ones."""
    generator = torch.Generator().manual_seed(seed)

    def start() -> Tensor:
        return mixture.figure_3_start(generator=generator)

    conditional, ema = mixture.fit_conditional(
        mixture.LEARNED_SIGMAS, seed=seed, num_steps=CONDITIONAL_STEPS, ema_decay=0.99
    )
    ema.copy_to(conditional)
    points = {
        "exact sampling": TWO_MODES.sample(1280, generator=generator),
        "plain Langevin": mixture.plain_langevin(start(), generator=generator),
        "annealed Langevin": mixture.annealed_toy_langevin(start(), generator=generator),
        "plain, learned score": mixture.plain_langevin(start(), generator=generator, score=network),
        "annealed, learned score": mixture.annealed_learned_langevin(start(), network=conditional, generator=generator),
    }
    for name, x in points.items():
        if not torch.isfinite(x).all():
            raise UserError("--seed", f"{name} diverged", hint="choose another seed", value=seed)
    return {name: mixture.mode_report(x) for name, x in points.items()}


def _figure_2(network: PlainScoreMlp) -> Figure:

    arrows, pixels = _grid(ARROWS), _grid(PIXELS)
    with torch.no_grad():
        fields = {"exact score": TWO_MODES.score(arrows), "learned score (sliced score matching)": network(arrows)}
    return score_fields(
        arrows.view(ARROWS, ARROWS, 2).double().numpy(),
        {title: field.view(ARROWS, ARROWS, 2).double().numpy() for title, field in fields.items()},
        density=TWO_MODES.log_density(pixels).exp().view(PIXELS, PIXELS).double().numpy(),
        trusted=TRUSTED,
    )


@torch.no_grad()
def _score_errors(network: PlainScoreMlp) -> tuple[float, float]:
    """Relative squared error of the learned score inside and outside of `TRUSTED`."""
    x = _grid(PIXELS)
    exact = TWO_MODES.score(x)
    error, size = (network(x) - exact).square().sum(dim=1), exact.square().sum(dim=1)
    inside = torch.zeros(len(x), dtype=torch.bool)
    for left, bottom, half in TRUSTED:
        inside |= (x - torch.tensor([left, bottom])).abs().amax(dim=1) <= half
    near, elsewhere = (float(error[part].sum() / size[part].sum()) for part in (inside, ~inside))
    return round(near, 4), round(elsewhere, 4)


def _grid(count: int) -> Tensor:
    """[count^2, 2] positions over [-8, 8]^2, x varying fastest."""
    axis = torch.linspace(-8, 8, count)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], dim=-1).view(-1, 2)


Array = NDArray[np.float64]

LIMIT = 8.0
"""The figures show [-8, 8]^2."""
_DENSITY = LinearSegmentedColormap.from_list(
    "density", [(*to_rgb(PALETTE[1]), 0.0), (*to_rgb(PALETTE[1]), 0.45), (*to_rgb(PALETTE[1]), 0.9)]
)


@dataclass(frozen=True)
class ModeSample:
    """Where one sampler's points ended.

    Attributes:
        title: Name of the sampler.
        points: [N, 2].
        weight: Share of them at the mode (5, 5).
    """

    title: str
    points: Array
    weight: float


@styled
def score_fields(
    positions: Array, fields: Mapping[str, Array], *, density: Array, trusted: Sequence[tuple[float, float, float]]
) -> Figure:
    """Figure 2: fields of scores as arrows over the density, darker where it is higher.

    Args:
        positions: [G, G, 2], x along the second axis, y along the first, ascending.
        fields: Title -> [G, G, 2] scores at the positions.
        density: [M, M] over [-8, 8]^2, y ascending along the first axis.
        trusted: (x, y, half side) of the squares in which the fields agree.
    """
    figure = new_figure(3.5 * len(fields), 3.7)
    for axes, (title, field) in zip(_square_axes(figure, len(fields)), fields.items(), strict=True):
        axes.imshow(
            density, extent=(-LIMIT, LIMIT, -LIMIT, LIMIT), origin="lower", cmap=_DENSITY, interpolation="bilinear"
        )
        x, y, u, v = positions[..., 0], positions[..., 1], field[..., 0], field[..., 1]
        axes.quiver(x, y, u, v, color=PALETTE[0], angles="xy", scale_units="xy", scale=9, width=0.004)
        for left, bottom, half in trusted:
            corner = (left - half, bottom - half)
            axes.add_patch(Rectangle(corner, 2 * half, 2 * half, fill=False, edgecolor="#d03030", linewidth=1.4))
        axes.set_title(title)
    return figure


@styled
def mode_samples(rows: Sequence[Sequence[ModeSample]], *, truth: float) -> Figure:
    """Figure 3: points of several samplers, with the share of them at the mode (5, 5).

    Args:
        rows: Rows of samplers.
        truth: The share that is right.
    """
    columns = max(len(row) for row in rows)
    figure = new_figure(2.6 * columns, 2.95 * len(rows))
    all_axes = _square_axes(figure, columns, len(rows))
    for number, axes in enumerate(all_axes):
        row, column = divmod(number, columns)
        if column >= len(rows[row]):
            axes.set_axis_off()
            all_axes[number - columns].tick_params(labelbottom=True)
            continue
        sample = rows[row][column]
        axes.plot(
            *sample.points.T, ".", color=PALETTE[1], markersize=2.2, markeredgewidth=0, alpha=0.7, rasterized=True
        )
        for place, height, share in ((-5.0, -1.2, 1 - sample.weight), (5.0, 1.2, sample.weight)):
            axes.annotate(f"{share:.2f}", (place, height), ha="center", va="center", fontsize=10)
        axes.set_title(sample.title)
    figure.supxlabel(f"shares of the points; the mixture has {1 - truth:.2f} and {truth:.2f}", color=INK, fontsize=8)
    return figure


def _square_axes(figure: Figure, columns: int, rows: int = 1) -> list[Axes]:
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat:
        axes.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal", xticks=[-5, 0, 5], yticks=[-5, 0, 5])
        axes.grid(visible=False)
    return list(grid.flat)
