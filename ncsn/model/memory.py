"""Memory that a worker pod needs for each worker, estimated from the config."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn

from ncsn.config import Config
from ncsn.config.compute import LEAST_MEMORY, bytes_of
from ncsn.config.schema import UtilityConfig
from ncsn.config.training import AutoNoiseConfig, NoiseConfig
from ncsn.model import build
from ncsn.runs.steps import Work

_UNIT = 2**29  # estimates are rounded up to 0.5 GiB
_MARGIN = 1.25
_PROCESS = 0.7e9  # with Python, torch and Ray (measured: 670 MiB)
_NODE = 0.5e9  # Ray's other processes on a node
_SHM = 2**30  # of /dev/shm, which counts as memory: what the RayJob template gives each worker
_CUDA = 3e9  # CUDA's libraries and context in the host's memory
_STATE, _SNAPSHOT = 5, 6  # copies of the weights: gradients, moments and average included; for a checkpoint
_SAMPLING_SHARE = 1 / 6  # of training's feature maps, alive at once while sampling (measured: 8 to 11 %)
_FLOAT, _DOUBLE = 4, 8
# Extractor -> its features, bytes to load its weights (measured: 1.86 GB), bytes of an image in it.
_PRETRAINED = {"inception": (2048, 0.0, 20e6), "dinov2": (1024, 1.9e9, 20e6)}
_CLASSES = 1008  # of Inception; DINOv2 has none
_GROUPS = 20 + 10 * 6  # [D, D] matrices of the Fréchet distance's jackknife: of all groups, and of ten at once


def worker_memory(config: Config, workers: Collection[Work], *, reference_images: int = 0) -> int:
    """Bytes for one of the `workers` of a step, /dev/shm included: a quarter more than estimated.

    Those that compare features or train classifiers need the number of `reference_images`, the training images.
    """
    if isinstance(config.noise, AutoNoiseConfig):
        config = config.model_copy(update={"noise": NoiseConfig()})  # the levels take next to no memory
    need = _PROCESS + (_CUDA if config.compute.use_gpu else 0.0)
    need += _network(config, workers)
    if "features" in workers:
        # The extractor on a batch, or afterwards the metrics.
        if (kind := config.evaluation.pretrained) is None:
            need += 1e9
        else:
            features, weights, image = _PRETRAINED[kind]
            extracting = weights + (0.0 if config.compute.use_gpu else image * config.evaluation.batch_size)
            samples = (_FLOAT * features + _DOUBLE * _CLASSES) * config.sampling.num_images
            metrics = 2 * _FLOAT * features * reference_images + samples + _DOUBLE * features**2 * _GROUPS
            need += max(extracting, metrics + 2 * _DOUBLE * 10_000 * (features + 2 * 1024))  # with the balls
    if "classifiers" in workers:  # one on a batch, and images of both kinds
        made = max((config.utility or UtilityConfig()).ratios)
        need += 1e9 + (1 + made) * reference_images * config.data.pixels.num_bytes
    whole = _MARGIN * (need + _NODE) + _SHM
    return max(round(bytes_of(LEAST_MEMORY)), math.ceil(whole / _UNIT) * _UNIT)


def kept_bytes(network: nn.Module, config: Config) -> int:
    """Bytes of the feature maps that autograd keeps of one image. The network is on the device `meta`."""
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size() if not isinstance(tensor, nn.Parameter) else 0
        return tensor

    image = torch.empty(1, *config.data.network_shape, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        network(image, torch.zeros(1, dtype=torch.long, device="meta"))
    return kept


def _network(config: Config, workers: Collection[Work]) -> float:
    """Bytes to train the network or to sample from it, whichever is more; none for workers that do neither."""
    training, sampling = "training" in workers, "sampling" in workers
    if not training and not sampling:
        return 0.0
    with torch.device("meta"):
        network = build.network(config).to("meta")
    weights = _FLOAT * sum(parameter.numel() for parameter in network.parameters())
    compute = config.compute
    if compute.use_gpu:
        return (_SNAPSHOT if training else 1) * weights
    kept = kept_bytes(network, config)
    share = math.ceil(config.train.batch_size / compute.min_workers)
    copies = _STATE + _SNAPSHOT + config.loss.has_teacher
    return max(
        (copies * weights + kept * min(share, compute.microbatch or share)) if training else 0.0,
        (weights + _SAMPLING_SHARE * kept * config.sampling.batch_size) if sampling else 0.0,
    )
