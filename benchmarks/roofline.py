"""What a network asks of a GPU, counted without one, and how long it should take there: a model, not a measurement.

    python -m benchmarks.roofline CONFIG [--gpu h100] [--set KEY=VALUE] [--run RUN]

It prints what `ncsn plan` measures, for workers with such a GPU each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ncsn.cli.console import console_on, print_plan
from ncsn.config import Config, from_yaml
from ncsn.init.plan import Speed, estimate, with_levels, without_values

# FLOP/s of matrix products in bfloat16 and bytes/s from and to memory, at most, by data sheets.
GPUS = {"a100": (312e12, 2.04e12), "h100": (989e12, 3.35e12), "h200": (989e12, 4.8e12)}
# Of that, training reaches half: so does NVIDIA's ResNet-50 on an A100 of 80 GB, with 2,470 images/s in mixed precision
# (DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5, measured in container 21.03).
SHARE = 0.5
# Seconds of the shortest kernel at most of what is allowed: in CUDA graphs it takes 3.4 us (Gray, "Getting Started with
# CUDA Graphs", NVIDIA 2019). Elementwise operations that are fused have none.
_KERNEL = 3.4e-6 * SHARE
# Of an update, in values of two bytes for each parameter: ten of float32, of which nine are Adam's and the EMA's.
_OF_UPDATE = 20


class Work(TorchDispatchMode):
    """Counts the operations of a block, for tensors on the device `meta`, as a GPU does them in a compiled network.

    An elementwise operation is fused with others: it reads what they have written, and what it makes is written when
    another kind of operation reads it. A norm reads its maps twice, and what it makes is fused too.
    """

    def __init__(self, images: int) -> None:
        super().__init__()
        self.images = images
        self.operations: list[tuple[int, int]] = []  # FLOP, and values from and to memory; before fusion
        self._unwritten: set[int] = set()  # storages

    @property
    def flop(self) -> float:
        """Of an image; a multiplication and its addition are two."""
        return sum(flop for flop, _ in self.operations) / self.images

    def seconds(self, gpu: str, *, precision: str) -> float:
        """Predicted for an image. Each kernel waits for its products or for memory; float32 takes twice as long."""
        flops, bandwidth = GPUS[gpu]
        kernels = ((flop, values) for flop, values in self.operations if flop or values)
        least = sum(max(flop / flops, 2 * values / bandwidth, _KERNEL) for flop, values in kernels)
        return least / self.images / SHARE * (2 if precision == "float32" else 1)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view:
            return result
        given, made = (
            [(x.untyped_storage()._cdata, x.numel()) for x in tree_leaves(tree) if isinstance(x, Tensor)]
            for tree in ((args, kwargs), result)
        )
        read, written = (sum(values for _, values in each) for each in (given, made))
        passed = sum(values for place, values in given if place in self._unwritten)
        elementwise = torch.Tag.pointwise in func.tags or "_to_copy" in func.name()
        norm = "_norm" in func.name()
        if not elementwise:
            self._unwritten -= {place for place, _ in given}
        self._unwritten -= {place for place, _ in made}
        if elementwise or norm:
            self._unwritten |= {place for place, _ in made}
        flop = flop_registry.get(func.overloadpacket, lambda *_, **__: 0)(*args, **kwargs, out_val=result)
        values = read - passed if elementwise else 2 * read if norm else read + passed + written
        self.operations.append((flop, values))
        return result


def predict(config: Config, *, gpu: str) -> dict[str, Any]:
    """The estimate of `ncsn plan` for workers with one of `GPUS` each. The config has noise levels and uses GPUs."""
    network, work = without_values(config)
    counted = []
    for images, compute in work.values():
        with Work(images) as operations:
            compute()
        counted.append(operations)
    training, sampling = counted
    training.operations.append((0, _OF_UPDATE * sum(parameter.numel() for parameter in network.parameters())))
    workers = config.compute.max_workers
    precision = config.train.precision
    precision_of_samples = precision if config.sampling.precision == "auto" else config.sampling.precision
    times = training.seconds(gpu, precision=precision), sampling.seconds(gpu, precision=precision_of_samples)
    basis = f"predicted for {workers} x {gpu} at {SHARE:.0%} of what its data sheet allows"
    return estimate(config, Speed(*(time / workers for time in times)), basis=basis)


def main() -> None:
    """Print the estimate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another value of a setting")
    parser.add_argument("--run", help="whose dataset `noise: auto` chooses levels for; default: the config's name")
    options = parser.parse_args()
    config = from_yaml(options.config.read_text(), overrides=[*options.set, "compute.use_gpu=true"])
    config = with_levels(config, options.run or config.name)
    print_plan(console_on(sys.stdout), predict(config, gpu=options.gpu))


if __name__ == "__main__":
    main()
