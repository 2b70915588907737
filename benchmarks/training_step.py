"""The training step of the paper's network against the plainest implementation, on one core or one GPU.

Needs only torch, numpy and ncsn.core.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.measure import Row, in_turns, own_process, ratio
from benchmarks.plain_ncsn import PlainNcsn
from ncsn.core.ema import Ema, step_decay
from ncsn.core.losses import Batch, DenoisingScoreMatching
from ncsn.core.networks.refinenet import NcsnNetwork
from ncsn.core.noise_schedule import geometric_sigmas
from ncsn.core.training import StepOptions, TrainState, train_step
from ncsn.environment import settle

SIZE, LEVELS, FEATURES = 28, 10, 64
# Of one 28x28x1 image through the network of 64 features, convolutions only, 2 per multiplication and addition.
FORWARD_BACKWARD_FLOP = 11_357_939_712
REPEATS = 20  # of the convolution, so that it takes long enough to be timed
STEPS_ON_GPU = 30  # between two readings of the clock, since training does not wait for each step of a GPU either
PEAK_ON_GPU = 16  # times the batch, for the convolution; with fewer images the GPU waits for the next call
# Returns the mean loss of an image, 1.0 for a network that predicts zero.
Step = Callable[[Batch], Tensor]


def batches(batch: int, sigmas: Tensor, *, count: int = 64) -> Iterator[Batch]:
    """Endless (images, levels, noise): smooth blobs that a network can learn, `count` different batches."""
    draw = torch.Generator().manual_seed(0)

    def one() -> Batch:
        coarse = torch.rand(batch, 1, 4, 4, generator=draw)
        x = functional.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic").clamp(0, 1)
        level = torch.randint(0, LEVELS, (batch,), generator=draw)
        z = torch.randn(x.shape, generator=draw)
        level = level.to(sigmas.device)
        return Batch(x.to(sigmas.device), sigmas[level], z.to(sigmas.device), level)

    return cycle([one() for _ in range(count)])


def plain_step(network: PlainNcsn) -> Step:
    """Float32 (TF32 in convolutions of a GPU, PyTorch's default), eager, default Adam, a loop for the average."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    average = {name: value.detach().clone() for name, value in network.named_parameters()}

    def step(batch: Batch) -> Tensor:
        x, level, z = batch.x, batch.level, batch.z
        sigma = batch.sigma[:, None, None, None]
        optimizer.zero_grad()
        loss = (sigma * network(x + sigma * z, level) + z).square().sum(dim=(1, 2, 3)).mean() / 2
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, value in network.named_parameters():
                average[name].mul_(0.999).add_(value, alpha=0.001)
        return 2 * loss.detach() / x[0].numel()

    return step


def our_step(network: nn.Module) -> Step:
    """The step of `ncsn train` in bfloat16."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    state = TrainState(network, optimizer, Ema(network, step_decay(0.999)))
    options = StepOptions(autocast_dtype=torch.bfloat16)

    def step(batch: Batch) -> Tensor:
        losses, _ = train_step(network, batch, state=state, loss=DenoisingScoreMatching(), options=options)
        return losses.mean()

    return step


def convolution_flop(batch: int, device: torch.device) -> float:
    """FLOP of the convolution that `prepare_convolution` times."""
    return REPEATS * 3.0 * 2 * _peak_batch(batch, device) * (2 * FEATURES) ** 2 * 9 * (SIZE // 2) ** 2


def _peak_batch(batch: int, device: torch.device) -> int:
    return batch * (PEAK_ON_GPU if device.type == "cuda" else 1)


def _steps(device: torch.device) -> int:
    """Training steps between two readings of the clock."""
    return STEPS_ON_GPU if device.type == "cuda" else 1


def prepare_convolution(name: str, batch: int) -> Callable[[], None]:
    """`REPEATS` forward and backward passes of the network's most common convolution in bfloat16."""
    torch.set_num_threads(1)
    settle()
    device = torch.device(name)
    images = _peak_batch(batch, device)
    x = torch.randn(images, 2 * FEATURES, SIZE // 2, SIZE // 2, device=device, dtype=torch.bfloat16)
    weight = torch.randn(2 * FEATURES, 2 * FEATURES, 3, 3, device=device, dtype=torch.bfloat16)
    x, weight = (t.contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, weight))
    gradient = functional.conv2d(x, weight, padding=1).detach()

    def both() -> None:
        for _ in range(REPEATS):
            y = functional.conv2d(x, weight, padding=1)
            torch.autograd.grad(y, (x, weight), gradient)
        synchronise(device)

    return both


def synchronise(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    *, device: torch.device, batch: int, rounds: int, compiled: bool, speedup: float, share_of_peak: float
) -> list[Row]:
    """Images per second over the plain step's, and the share of the machine's rate for convolutions."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    with (
        own_process(prepare_plain, str(device), batch, clock=clock) as plain,
        own_process(prepare_ours, str(device), batch, "compiled" if compiled else "eager", clock=clock) as ours,
        own_process(prepare_convolution, str(device), batch, clock=clock) as peak,
    ):
        seconds = in_turns({"plain": plain, "ours": ours, "peak": peak}, rounds=rounds)
    images = batch * _steps(device)
    speed = {name: images / statistics.median(values) for name, values in seconds.items()}
    step_flop, peak_flop = images * FORWARD_BACKWARD_FLOP, convolution_flop(batch, device)
    used = 100 * ratio(seconds, "peak", "ours") * step_flop / peak_flop
    peak_speed = peak_flop / statistics.median(seconds["peak"])
    where = "one CPU core" if device.type == "cpu" else torch.cuda.get_device_name(device)
    how = "compiled bfloat16" if compiled else "bfloat16"
    return [
        Row(
            "training step",
            f"{how} over plain float32, {where}: ncsn, 28x28, 64 channels, batch {batch}",
            ratio(seconds, "plain", "ours"),
            target=speedup,
            detail=f"{speed['ours']:,.1f} over {speed['plain']:,.1f} images/s",
        ),
        Row(
            "machine use",
            f"{how}, {where}: FLOP/s of that step over those of its commonest convolution",
            used,
            unit="%",
            target=share_of_peak,
            detail=f"{speed['ours'] * FORWARD_BACKWARD_FLOP / 1e9:,.0f} of {peak_speed / 1e9:,.0f} GFLOP/s",
        ),
    ]


def prepare_plain(device: str, batch: int) -> Callable[[], None]:
    """Steps of the plain implementation on the next batches."""
    plain, _, sigmas = _start(torch.device(device))
    return _on_next_batches(plain_step(plain), batch, sigmas)


def prepare_ours(device: str, batch: int, mode: str) -> Callable[[], None]:
    """Steps of ours; `mode` is "eager" or "compiled"."""
    settle()
    _, ours, sigmas = _start(torch.device(device))
    if device != "cpu":
        ours.to(memory_format=torch.channels_last)
    if mode == "compiled":
        ours.compile()
    return _on_next_batches(our_step(ours), batch, sigmas)


def _on_next_batches(step: Step, batch: int, sigmas: Tensor) -> Callable[[], None]:
    given = batches(batch, sigmas)

    def some() -> None:
        for _ in range(_steps(sigmas.device)):
            step(next(given))
        synchronise(sigmas.device)

    return some


def loss_curves(*, device: torch.device, batch: int, steps: int, num_features: int) -> Row:
    """Whether both steps learn alike: the mean loss of the last fifth of the steps, from the same start and data."""
    threads = torch.get_num_threads()
    plain, ours, sigmas = _start(device, num_features=num_features)
    last: dict[str, list[float]] = {}
    for name, step in (("plain", plain_step(plain)), ("ours", our_step(ours))):
        given = batches(batch, sigmas)
        losses = [step(next(given)) for _ in range(steps)]
        last[name] = torch.stack(losses[-steps // 5 :]).tolist()
    torch.set_num_threads(threads)
    means = {name: statistics.fmean(values) for name, values in last.items()}
    noise = statistics.stdev(last["plain"]) / len(last["plain"]) ** 0.5
    return Row(
        "training step",
        f"loss after {steps} steps, bfloat16 over plain float32 ({num_features} channels)",
        means["ours"] / means["plain"],
        target=1 + 3 * noise / means["plain"],
        higher_is_better=False,
        detail=f"{means['ours']:.1f} and {means['plain']:.1f}, standard error {noise:.1f}",
    )


def _start(device: torch.device, *, num_features: int = FEATURES) -> tuple[PlainNcsn, NcsnNetwork, Tensor]:
    """Both networks with the same weights, and the noise levels."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = PlainNcsn(num_features, channels=1, num_levels=LEVELS)
    ours = NcsnNetwork(num_features, channels=1, num_levels=LEVELS)
    ours.load_state_dict(plain.state_dict())
    return plain.to(device), ours.to(device), geometric_sigmas(1.0, 0.01, LEVELS).float().to(device)


def rows() -> list[Row]:
    """On one core; also compiled if there is a C++ compiler, which takes more than a minute before the first step."""
    cpu = torch.device("cpu")
    on_cpu = partial(measure, device=cpu, batch=32, rounds=5, speedup=2.3, share_of_peak=70)
    return [
        *on_cpu(compiled=False),
        *(on_cpu(compiled=True) if shutil.which(os.environ.get("CXX", "g++")) else []),
        loss_curves(device=cpu, batch=32, steps=500, num_features=8),
    ]


if __name__ == "__main__":
    began = time.perf_counter()
    for row in rows():
        print(row, flush=True)
    print(f"{time.perf_counter() - began:.0f} s")
