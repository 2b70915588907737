"""The paper's two-dimensional experiments, Figures 2 and 3, from exact and from learned scores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ncsn import storage
from ncsn.core import toy
from ncsn.core.toy import TWO_MODES, ModeReport, PlainScoreMlp
from ncsn.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    from ncsn.report.toy_plots import ModeSample, mode_samples

    with _one_thread():
        network = toy.fit_figure_2(seed=seed, num_steps=PLAIN_STEPS)
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
        return toy.figure_3_start(generator=generator)

    conditional, ema = toy.fit_conditional(toy.LEARNED_SIGMAS, seed=seed, num_steps=CONDITIONAL_STEPS, ema_decay=0.99)
    ema.copy_to(conditional)
    points = {
        "exact sampling": TWO_MODES.sample(1280, generator=generator),
        "plain Langevin": toy.plain_langevin(start(), generator=generator),
        "annealed Langevin": toy.annealed_toy_langevin(start(), generator=generator),
        "plain, learned score": toy.plain_langevin(start(), generator=generator, score=network),
        "annealed, learned score": toy.annealed_learned_langevin(start(), network=conditional, generator=generator),
    }
    for name, x in points.items():
        if not torch.isfinite(x).all():
            raise UserError("--seed", f"{name} diverged", hint="choose another seed", value=seed)
    return {name: toy.mode_report(x) for name, x in points.items()}


def _figure_2(network: PlainScoreMlp) -> Figure:
    from ncsn.report.toy_plots import score_fields

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
