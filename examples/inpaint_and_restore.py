"""Complete and restore images with a network that was trained on clean ones only.

Algorithm 2 of Song & Ermon (2019) completes images by annealed Langevin dynamics: known pixels are set at each step to
the image plus the level's noise. Pseudo-inverse guidance (Song et al. 2023) draws images given any linear measurement
y = A x + sigma_y n, with any sampler, by a score that the measurement guides. To the score of x at sigma it adds J^T v
with the derivative J = dD/dx of the denoised image, by one vector-Jacobian product through the network, and
v = A^T (sigma_y^2 I + r^2 A A^T)^-1 (y - A D): the gradient of the log density of y where an image given x has variance
r^2 around D. r = 0 is stiff and diverges. With one r for all pixels, taken for independent, the images spread less than
they should; on a correlated Gaussian their mean is off by 0.4 to 0.5 standard deviations of the posterior.

    python examples/inpaint_and_restore.py --out restored.png
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from matplotlib.figure import Figure
from small_images import Images, Model, arguments, digits, fashion, show, train
from torch import Tensor
from torch.nn.functional import interpolate

from ncsn.core.keyed_random import KeyedNoise
from ncsn.core.losses import ScoreFunction
from ncsn.core.samplers.chain import sample, start
from ncsn.core.samplers.langevin import Fields, NoiseSource, field_of, inpaint
from ncsn.core.samplers.settings import AnySampler, KarrasHeun
from ncsn.errors import InvalidValue

_WIDEST = 4.0  # where the kernel of a blur ends, in standard deviations


@dataclass(frozen=True)
class KnownPixels:
    """The pixels where the mask is true; a measurement has 0 at the others."""

    mask: Tensor  # bool, broadcast to [B, C, H, W]

    @property
    def blind(self) -> bool:
        """Whether nothing is measured."""
        return not bool(self.mask.any())

    def apply(self, x: Tensor) -> Tensor:
        """A x of images [B, C, H, W]."""
        return torch.where(self.mask, x, 0.0)

    adjoint = apply  # A^T y

    def explain(self, residual: Tensor, *, noise: float, spread: float) -> Tensor:
        """A^T (noise I + spread A A^T)^-1 residual, both variances; for images of variance `spread` their change.

        Where A A^T = I, as here, it is A^T residual / (noise + spread).
        """
        return self.adjoint(residual) / (noise + spread)


class Separable:
    """A x = R x C^T for each channel of images, by matrices R [h, H] over rows and C [w, W] over columns."""

    blind = False

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        self._rows, self._columns = rows, columns
        self._svds = [torch.linalg.svd(matrix.double(), full_matrices=False) for matrix in (rows, columns)]

    def apply(self, x: Tensor) -> Tensor:
        return self._rows.to(x) @ x @ self._columns.to(x).T

    def adjoint(self, y: Tensor) -> Tensor:
        return self._rows.to(y).T @ y @ self._columns.to(y)

    def explain(self, residual: Tensor, *, noise: float, spread: float) -> Tensor:
        (u, s, v), (u_columns, s_columns, v_columns) = self._svds
        gains = s[:, None] * s_columns
        factors = (gains / (noise + spread * gains.square())).to(residual)
        inner = (u.to(residual).T @ residual @ u_columns.to(residual)) * factors
        change: Tensor = v.to(residual).T @ inner @ v_columns.to(residual)
        return change


Operator = KnownPixels | Separable


def means(height: int, width: int, *, factor: int) -> Separable:
    """The means over squares of `factor` x `factor` pixels; `factor` divides both sides of the images."""
    if height % factor or width % factor:
        raise InvalidValue(f"the factor must divide {height} and {width}, got {factor}")
    rows, columns = (torch.eye(side // factor).repeat_interleave(factor, dim=1) / factor for side in (height, width))
    return Separable(rows, columns)


def blur(height: int, width: int, *, deviation: float) -> Separable:
    """Blur by a normal kernel of this standard deviation in pixels, mirrored at the edges."""
    if not deviation > 0:
        raise InvalidValue(f"the deviation of a blur must be positive, got {deviation}")
    offsets = torch.arange(-(radius := int(_WIDEST * deviation + 0.5)), radius + 1)
    kernel = torch.exp(-0.5 * (offsets.double() / deviation).square())
    matrices = []
    for side in (height, width):
        places = (torch.arange(side)[:, None] + offsets) % (2 * side)
        places = torch.where(places < side, places, 2 * side - 1 - places)
        matrix = torch.zeros(side, side, dtype=torch.float64)
        matrices.append(matrix.scatter_add_(1, places, (kernel / kernel.sum()).expand(side, -1)))
    return Separable(*matrices)


def peak_signal_to_noise(x: Tensor, truth: Tensor) -> float:
    """PSNR in dB of values in [0, 1], over all of them; infinite for equal ones."""
    error = float((x.double() - truth.double()).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


_FARTHEST = 20.0  # from zero, in standard deviations of data plus noise; a diverging chain soon goes beyond


class Diverged(InvalidValue):
    """The guidance drove an image away from all data."""


@dataclass(frozen=True)
class Observation:
    """What is known of the images that are sought."""

    operator: Operator
    y: Tensor  # 0 at pixels that are not known
    noise: float = 0.0  # sigma_y


Variance = Callable[[float], float]


def gaussian_variance(sigma_data: float) -> Variance:
    """r^2 at sigma for normal data of deviation `sigma_data`: their variance given data plus noise of sigma."""
    return lambda sigma: (sigma * sigma_data) ** 2 / (sigma**2 + sigma_data**2)


@dataclass(eq=False)
class Conditioned:
    """Score functions that a measurement of a batch guides, as samplers take them."""

    network: ScoreFunction | Fields
    measured: Observation
    variance: Variance  # r^2 at sigma
    sigmas: Tensor  # the network's levels [L], descending
    scale: float  # root mean square of the data, by which divergence is noticed
    fields: dict[int, Conditioned] = field(default_factory=dict)

    def field_at(self, sigma: float) -> Conditioned:
        """The score function that holds at sigma, see `field_of`."""
        there = field_of(self.network, sigma)
        if there is self.network:
            return self
        if id(there) not in self.fields:
            self.fields[id(there)] = replace(self, network=there, fields={})
        return self.fields[id(there)]

    def __call__(self, x: Tensor, level: Tensor | None = None, *, sigma: Tensor | None = None) -> Tensor:
        """Score of a batch that is at one level, or at one sigma."""
        at = float((self.sigmas[level[:1]] if level is not None else sigma[:1]).to(x.dtype))
        require_bounded(x, sigma=at, scale=self.scale)
        measured, spread = self.measured, self.variance(at)
        if not spread + measured.noise > 0:
            raise Diverged("r^2 and sigma_y are both 0")
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            noise = {"level": level} if sigma is None else {"sigma": sigma}
            score = field_of(self.network, at)(x, **noise).to(x.dtype)
            denoised = torch.add(x, score, alpha=at**2)
            residual = measured.y - measured.operator.apply(denoised.detach())
            pull = measured.operator.explain(residual, noise=measured.noise**2, spread=spread)
            (change,) = torch.autograd.grad(denoised, x, pull)
        return score.detach() + change


def require_bounded(x: Tensor, *, sigma: float, scale: float) -> None:
    """Raise `Diverged` if the state of a sampler at sigma is farther out than data plus noise can be."""
    if not bool((x.abs() <= _FARTHEST * (scale + sigma)).all()):
        raise Diverged(f"at sigma = {sigma:.3g} the guided images are farther out than any image with noise")


@torch.no_grad()
def restored(
    network: ScoreFunction | Fields,
    measured: Observation,
    variance: Variance,
    *,
    sampler: AnySampler,
    x: Tensor,
    sigmas: Tensor,
    noise: NoiseSource,
    scale: float,
) -> Tensor:
    """Images that a sampler draws given a measurement; pixels that are known without noise come back exactly.

    A measurement of nothing gives what the sampler gives alone, bit by bit.

    Args:
        variance: r^2 at sigma, see `gaussian_variance`.
        sampler: On a grid from the largest to the smallest sigma.
        x: Start [B, C, H, W].
        sigmas: The network's levels [L], descending.
        scale: Root mean square of the data, by which divergence is noticed.

    Raises:
        Diverged: The images left the region of the data.
    """
    operator = measured.operator
    if operator.blind:
        return sample(sampler, network, x=x, sigmas=sigmas, noise=noise)
    guided = Conditioned(network, measured, variance, sigmas, scale)
    x = sample(sampler, guided, x=x, sigmas=sigmas, noise=noise)
    require_bounded(x, sigma=0.0, scale=scale)
    if isinstance(operator, KnownPixels) and measured.noise == 0:
        return torch.where(operator.mask, measured.y, x)
    return x


@dataclass(frozen=True)
class Outcome:
    """One task."""

    name: str
    given: Tensor  # as an image [N, 1, H, W]: with 0.5 at unknown pixels, enlarged, or blurred
    made: Tensor  # [N, 1, H, W]
    simple: Tensor  # an answer that needs no network


def complete(model: Model, images: Tensor, mask: Tensor) -> Tensor:
    """Algorithm 2: images [N, 1, H, W] whose unknown pixels, where mask [H, W] is False, are drawn."""
    noise = KeyedNoise(0, first=0, count=len(images), shape=images.shape[1:])
    sigmas = model.network.sigmas
    # The step at each level is epsilon sigma^2 / sigma_L^2, so this is a fifth of sigma^2.
    epsilon = 0.2 * float(sigmas[-1]) ** 2
    return inpaint(
        model.network,
        x=noise.uniform(0),
        reference=images,
        mask=mask,
        sigmas=sigmas,
        epsilon=epsilon,
        steps_per_level=20,
        noise=noise,
    )


def restore(model: Model, y: Tensor, operator: Operator, *, sigma_y: float, steps: int = 30) -> Tensor:
    """Images [N, 1, H, W] that fit the measurement y = A x + sigma_y n."""
    noise = KeyedNoise(0, first=0, count=len(y), shape=model.moments.mean.shape)
    sampler, sigmas = KarrasHeun(num_steps=steps), model.network.sigmas
    return restored(
        model.network,
        Observation(operator, y, noise=sigma_y),
        gaussian_variance(model.network.sigma_data),
        sampler=sampler,
        x=start(sampler, model.moments, sigma_1=float(sigmas[0]), noise=noise),
        sigmas=sigmas,
        noise=noise,
        scale=1.0,
    )


def run_tasks(model: Model, truth: Tensor) -> list[Outcome]:
    """All tasks on the same test images [N, 1, H, W]."""
    size = truth.shape[-1]
    mean = model.moments.mean

    left = torch.zeros(size, size, dtype=torch.bool)
    left[:, : size // 2] = True
    box = torch.ones(size, size, dtype=torch.bool)
    box[size // 4 : -size // 4, size // 4 : -size // 4] = False
    outcomes = [
        Outcome("right half, Algorithm 2", torch.where(left, truth, 0.5), complete(model, truth, left),
                torch.where(left, truth, mean)),
        Outcome("square, guided", torch.where(box, truth, 0.5),
                restore(model, torch.where(box, truth, 0.0), KnownPixels(box), sigma_y=0.0),
                torch.where(box, truth, mean)),
    ]  # fmt: skip
    # A quarter of the pixels, each the mean of four; and an image blurred and noisy.
    generator = torch.Generator().manual_seed(0)
    shrunk, blurred = means(size, size, factor=2), blur(size, size, deviation=0.8)
    for name, operator, sigma_y in (("half the size", shrunk, 0.0), ("blur and noise", blurred, 0.05)):
        y = operator.apply(truth)
        y = y + sigma_y * torch.randn(y.shape, generator=generator)
        shown = interpolate(y, size=(size, size)) if y.shape[-1] < size else y
        smooth = interpolate(y, size=(size, size), mode="bilinear") if y.shape[-1] < size else y
        outcomes.append(Outcome(name, shown, restore(model, y, operator, sigma_y=sigma_y), smooth))
    return outcomes


def main() -> None:
    given = arguments(__doc__, out="restored.png")
    images: Images = fashion(given.data) if given.full else digits()
    widths = (32, 64, 96) if given.full else (32, 64)
    model = train(images, num_images=100_000 if given.full else 40_000, widths=widths)
    truth = images.test[:32]
    outcomes = run_tasks(model, truth)
    figure, size = Figure(figsize=(13, 4), layout="constrained"), truth.shape[-1]
    for axes, outcome in zip(figure.subplots(2, 2).flat, outcomes, strict=True):
        show(axes, [x[:12] for x in (outcome.given, outcome.made, truth)], outcome.name)
        axes.set_yticks([size / 2 + size * row for row in range(3)], ["given", "made", "truth"])
        made, simple = (peak_signal_to_noise(x.clamp(0, 1), truth) for x in (outcome.made, outcome.simple))
        print(f"{outcome.name:25} PSNR {made:5.1f} dB, without a network {simple:5.1f} dB")
    figure.savefig(given.out, dpi=110)


if __name__ == "__main__":
    main()
