"""`ncsn toy`: Figures 2 and 3 of Song & Ermon (2019), from exact and from learned scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ncsn import storage
from ncsn.core.noise_schedule import geometric_sigmas
from ncsn.core.samplers.langevin import annealed_langevin
from ncsn.errors import UserError
from ncsn.report.style import INK, PALETTE, new_figure, styled, to_png
from ncsn.tools.mixture import (
    TWO_MODES,
    ModeReport,
    PlainScoreMlp,
    annealed_toy_langevin,
    figure_3_start,
    fit_conditional,
    fit_figure_2,
    mode_report,
    plain_langevin,
)
from ncsn.tools.speed import torch_threads

PLAIN_STEPS = 10_000
CONDITIONAL_STEPS = 2000  # enough for the weights of the modes, not for the last digits of the score
LEARNED_SIGMAS = geometric_sigmas(10.0, 0.1, 10)  # noise added to the mixture for the conditional network
LEARNED_EPSILON = 1e-3
LIMIT = 8.0  # the figures show [-8, 8]^2
SQUARES = ((5.0, 5.0, 2.5), (-5.0, -5.0, 2.5))  # (x, y, half side) around the modes, where there is data to learn from
ARROWS, PIXELS = 17, 128


@dataclass(frozen=True)
class ToyResult:
    """What the two experiments measured."""

    uri: str  # JSON file with everything below
    figure_2: str  # PNG: the exact and the learned score field
    figure_3: str  # PNG: the points of plain and annealed Langevin dynamics
    true_weight: float  # of the mode (5, 5)
    weights: dict[str, float]  # sampler -> share of its points there
    score_error_near: float  # squared error of the learned score over the squared exact one, in the squares
    score_error_elsewhere: float  # the same in the rest of [-8, 8]^2
    seed: int


def run(folder: str, *, seed: int = 0) -> ToyResult:
    """Learn the score of the mixture, sample with it and with the exact one, and draw both figures in `folder`."""
    # The networks are too small to share, and one thread adds in the same order on every machine.
    with torch_threads(1):
        network = fit_figure_2(seed=seed, num_steps=PLAIN_STEPS)
        reports = _reports(network, seed=seed)
    folder = storage.absolute(folder)
    near, elsewhere = _score_errors(network)
    result = ToyResult(
        uri=storage.join(folder, "toy.json"),
        figure_2=storage.join(folder, "figure_2.png"),
        figure_3=storage.join(folder, "figure_3.png"),
        true_weight=float(TWO_MODES.weights[1]),
        weights={name: round(report.weight, 4) for name, report in reports.items()},
        score_error_near=near,
        score_error_elsewhere=elsewhere,
        seed=seed,
    )
    storage.write_bytes(result.figure_2, to_png(_figure_2(network)))
    storage.write_bytes(result.figure_3, to_png(_figure_3(reports)))
    spread = {name: {"mean": report.mean.tolist(), "variance": report.variance} for name, report in reports.items()}
    storage.write_json(result.uri, asdict(result) | {"at_mode_5_5": spread}, indent=1)
    return result


def _reports(network: PlainScoreMlp, *, seed: int) -> dict[str, ModeReport]:
    """The three samplers of Figure 3 with exact scores, and two more with learned ones."""
    generator = torch.Generator().manual_seed(seed)
    conditional, ema = fit_conditional(LEARNED_SIGMAS, seed=seed, num_steps=CONDITIONAL_STEPS, ema_decay=0.99)
    ema.copy_to(conditional)

    def start() -> Tensor:
        return figure_3_start(generator=generator)

    def annealed_learned(x: Tensor) -> Tensor:
        return annealed_langevin(
            conditional,
            x=x,
            sigmas=LEARNED_SIGMAS,
            epsilon=LEARNED_EPSILON / 2,
            steps_per_level=100,
            noise=lambda _: torch.randn(x.shape, generator=generator),
            denoise=False,
        )

    points = {
        "exact sampling": TWO_MODES.sample(1280, generator=generator),
        "plain Langevin": plain_langevin(start(), generator=generator),
        "annealed Langevin": annealed_toy_langevin(start(), generator=generator),
        "plain, learned score": plain_langevin(start(), generator=generator, score=network),
        "annealed, learned score": annealed_learned(start()),
    }
    for name, x in points.items():
        if not torch.isfinite(x).all():
            raise UserError("--seed", f"{name} diverged", hint="choose another seed", value=seed)
    return {name: mode_report(x) for name, x in points.items()}


@torch.no_grad()
def _score_errors(network: PlainScoreMlp) -> tuple[float, float]:
    """Relative squared error of the learned score inside and outside of `SQUARES`."""
    x = _grid(PIXELS)
    exact = TWO_MODES.score(x)
    error, size = (network(x) - exact).square().sum(dim=1), exact.square().sum(dim=1)
    inside = torch.zeros(len(x), dtype=torch.bool)
    for left, bottom, half in SQUARES:
        inside |= (x - torch.tensor([left, bottom])).abs().amax(dim=1) <= half
    near, elsewhere = (float(error[part].sum() / size[part].sum()) for part in (inside, ~inside))
    return round(near, 4), round(elsewhere, 4)


def _grid(count: int) -> Tensor:
    """[count^2, 2] positions over [-8, 8]^2, x varying fastest."""
    axis = torch.linspace(-8, 8, count)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], dim=-1).view(-1, 2)


_DENSITY = LinearSegmentedColormap.from_list(
    "density", [(*to_rgb(PALETTE[1]), 0.0), (*to_rgb(PALETTE[1]), 0.45), (*to_rgb(PALETTE[1]), 0.9)]
)


@styled
def _figure_2(network: PlainScoreMlp) -> Figure:
    """Both score fields as arrows over the density, which is darker where it is higher."""
    positions, pixels = _grid(ARROWS), _grid(PIXELS)
    with torch.no_grad():
        fields = {
            "exact score": TWO_MODES.score(positions),
            "learned score (sliced score matching)": network(positions),
        }
    density = TWO_MODES.log_density(pixels).exp().view(PIXELS, PIXELS).double().numpy()
    x, y = positions.view(ARROWS, ARROWS, 2).double().numpy().transpose(2, 0, 1)
    figure = new_figure(3.5 * len(fields), 3.7)
    for axes, (title, field) in zip(_square_axes(figure, len(fields)), fields.items(), strict=True):
        axes.imshow(
            density, extent=(-LIMIT, LIMIT, -LIMIT, LIMIT), origin="lower", cmap=_DENSITY, interpolation="bilinear"
        )
        u, v = field.view(ARROWS, ARROWS, 2).double().numpy().transpose(2, 0, 1)
        axes.quiver(x, y, u, v, color=PALETTE[0], angles="xy", scale_units="xy", scale=9, width=0.004)
        for left, bottom, half in SQUARES:
            corner = (left - half, bottom - half)
            axes.add_patch(Rectangle(corner, 2 * half, 2 * half, fill=False, edgecolor="#d03030", linewidth=1.4))
        axes.set_title(title)
    return figure


@styled
def _figure_3(reports: Mapping[str, ModeReport]) -> Figure:
    """The points of the samplers in rows of three, with the share of each mode."""
    columns, truth = 3, float(TWO_MODES.weights[1])
    rows = math.ceil(len(reports) / columns)
    figure = new_figure(2.6 * columns, 2.95 * rows)
    all_axes = _square_axes(figure, columns, rows)
    for axes, (name, report) in zip(all_axes, reports.items(), strict=False):
        axes.plot(
            *report.points.numpy().astype(float).T,
            ".",
            color=PALETTE[1],
            markersize=2.2,
            markeredgewidth=0,
            alpha=0.7,
            rasterized=True,
        )
        for place, height, share in ((-5.0, -1.2, 1 - report.weight), (5.0, 1.2, report.weight)):
            axes.annotate(f"{share:.2f}", (place, height), ha="center", va="center", fontsize=10)
        axes.set_title(name)
    for number, axes in enumerate(all_axes[len(reports) :], start=len(reports)):
        axes.set_axis_off()
        all_axes[number - columns].tick_params(labelbottom=True)
    figure.supxlabel(f"shares of the points; the mixture has {1 - truth:.2f} and {truth:.2f}", color=INK, fontsize=8)
    return figure


def _square_axes(figure: Figure, columns: int, rows: int = 1) -> list[Axes]:
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat:
        axes.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal", xticks=[-5, 0, 5], yticks=[-5, 0, 5])
        axes.grid(visible=False)
    return list(grid.flat)
