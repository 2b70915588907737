"""The model of a GPU: what it counts of known operations, and that it agrees with a published figure."""

from __future__ import annotations

import pytest
import torch
import torchvision
from click import Choice
from torch.nn import functional

from ncsn.cli.app import app
from ncsn.tools.roofline import GPUS, SHARE, Work

MAPS = torch.empty(2, 3, 4, 4, device="meta")
WEIGHT = torch.empty(5, 3, 3, 3, device="meta")


def test_an_elementwise_operation_is_part_of_others() -> None:
    with Work(2) as work:
        functional.conv2d(2 * functional.silu(MAPS), WEIGHT, padding=1)
    # The first reads the maps. The convolution's are written before it reads them.
    assert work.operations == [(0, 96), (0, 0), (2 * 32 * 5 * 27, 96 + 96 + 135 + 160)]
    assert work.flop == 32 * 5 * 27 and work.bytes == 96 + 487


def test_a_norm_reads_its_maps_twice_and_is_part_of_what_reads_it() -> None:
    with Work(2) as work:
        functional.silu(functional.group_norm(functional.conv2d(MAPS, WEIGHT), 1)).sum()
    values = [values for _, values in work.operations]
    # 40 values come from the convolution, and are written by the activation before the sum reads them.
    assert values == [96 + 135 + 40, 2 * 40, 0, 40 + 40 + 1]


def test_an_operation_waits_for_its_products_or_for_memory() -> None:
    work = Work(10)
    work.operations = [(989 * 10**9, 1), (0, 3_350 * 10**6), (989 * 10**9, 3_350 * 10**6)]
    # Of a millisecond each, twice that, and the larger of both.
    assert work.seconds("h100", precision="bfloat16") == pytest.approx((1 + 2 + 2) * 1e-4 / SHARE, rel=1e-3)
    work.operations += [(0, 0), (0, 1), (1, 0)]  # one that is fused, and two of the shortest
    assert work.seconds("h100", precision="bfloat16") == pytest.approx(5e-4 / SHARE + 2 * 3.4e-7, rel=1e-3, abs=1e-9)
    assert work.seconds("h100", precision="float32") == 2 * work.seconds("h100", precision="bfloat16")


def test_half_of_what_a_gpu_allows_is_what_nvidia_s_resnet_50_reaches() -> None:
    with torch.device("meta"):
        network, images, labels = torchvision.models.resnet50(), torch.empty(256, 3, 224, 224), torch.zeros(256).long()
    with Work(256) as work:
        functional.cross_entropy(network(images), labels).backward()
    assert work.flop == pytest.approx(3 * 2 * 4.09e9, rel=0.02)  # less the gradient of the images
    assert 1 / work.seconds("a100", precision="float32") == pytest.approx(2_470 / 2, rel=0.02)


def test_the_command_offers_the_gpus_of_the_model() -> None:
    (kind,) = (option.type for option in app.commands["plan"].params if option.name == "gpu")
    assert isinstance(kind, Choice) and list(kind.choices) == list(GPUS)
