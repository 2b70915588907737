"""Weights of a trained network for another one, which training then starts from, and which of them it changes.

Tensors must agree in name and shape, but for what a network takes beside the image and for the channels of the image.
These are adapted so that the new network computes what the old one did, as far as it can.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ncsn.core.networks.base import misfits
from ncsn.errors import InvalidValue

_LABEL, _LABEL_BIAS, _AUGMENT = "map_label.weight", "map_label.bias", "map_augment.weight"
_CHANNELS = {(1, 3), (3, 1)}


def transfer(
    weights: Mapping[str, Tensor], network: nn.Module, *, classes: Sequence[int | None] | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """The parameters of a trained network, adapted to `network`, and what is not as there, one sentence each.

    - A network without classes computes what the source did without a class. For new classes of a network that had
      others, the term is the mean of those; a network that had none starts with terms of zero.
    - Augmentation labels start with weights of zero, or are left out.
    - Where gray becomes RGB or the reverse, the network does the same on gray images as before.

    Args:
        weights: All parameters of the source.
        classes: Label in the source of each class of the network; None for a new class. By default the source's own.

    Raises:
        InvalidValue: Other tensors are missing, superfluous or of another shape; it names the first.
    """
    wanted = {name: parameter.detach() for name, parameter in network.named_parameters()}
    adapted = dict(weights)
    changes = _adapt_classes(adapted, wanted, network, classes)
    name, there = _ending(adapted, _AUGMENT), _ending(wanted, _AUGMENT)
    if name is None and there is not None:
        adapted[there] = torch.zeros_like(wanted[there])
        changes.append("augmentation is new to the network")
    if name is not None and there is None:
        del adapted[name]
        changes.append("the source was told of augmentation, and starts as for images without it")
    changes += _adapt_channels(adapted, wanted)
    if found := misfits(adapted, wanted):
        raise InvalidValue(f"tensors {found}")
    return {name: adapted[name].to(tensor.dtype) for name, tensor in wanted.items()}, changes


def _adapt_classes(
    weights: dict[str, Tensor], wanted: Mapping[str, Tensor], network: nn.Module, classes: Sequence[int | None] | None
) -> list[str]:
    name, there = _ending(weights, _LABEL), _ending(wanted, _LABEL)
    if name is None and there is None:
        return []
    if name is None:
        assert there is not None
        for added in (there, there.replace(_LABEL, _LABEL_BIAS)):
            weights[added] = torch.zeros_like(wanted[added])
        return [f"{wanted[there].shape[1]} classes are new to the network, and start without an effect"]
    terms, bias = weights[name], weights[name.replace(_LABEL, _LABEL_BIAS)]
    if there is None:
        reader = f"{network.condition_reader}.bias"
        weights[reader] = weights[reader] + weights[reader.replace(".bias", ".weight")] @ bias
        del weights[name], weights[name.replace(_LABEL, _LABEL_BIAS)]
        return [f"the {terms.shape[1]} classes of the source are left out: it starts as the source without a class"]
    count = wanted[there].shape[1]
    chosen = list(classes if classes is not None else range(min(terms.shape[1], count)))
    chosen += [None] * (count - len(chosen))
    if chosen == list(range(terms.shape[1])):
        return []
    # The network multiplies one-hot labels by the root of the number of classes.
    scale, mean = math.sqrt(terms.shape[1] / count), terms.mean(dim=1)
    weights[name] = scale * torch.stack([mean if label is None else terms[:, label] for label in chosen], dim=1)
    new = chosen.count(None)
    if not new:
        return [f"its {count} classes are some of the source's {terms.shape[1]}, or have another order there"]
    return [f"{new} of {count} classes are new, and start as the mean of the source's {terms.shape[1]}"]


def _adapt_channels(weights: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Between gray and RGB: the first convolution, and the last with its shift."""
    found = set[tuple[int, int]]()
    for name, have in weights.items():
        want = wanted.get(name)
        if want is None or have.ndim != want.ndim:
            continue
        differ = [axis for axis in range(have.ndim) if have.shape[axis] != want.shape[axis]]
        sizes = {(have.shape[axis], want.shape[axis]) for axis in differ}
        if len(differ) != 1 or not sizes <= _CHANNELS:
            continue
        (axis,), ((old, new),) = differ, sizes
        mean = have.mean(dim=axis, keepdim=True).repeat_interleave(new, dim=axis)
        # The first convolution adds over its channels.
        weights[name] = mean * (old / new) if axis == 1 else mean
        found |= sizes
    return [f"images have {new} channels instead of {old}" for old, new in found]


def _ending(tensors: Mapping[str, Tensor], suffix: str) -> str | None:
    return next((name for name in tensors if name.endswith(f"condition_terms.{suffix}")), None)


def light_parameters(network: nn.Module) -> set[str]:
    """Names of the parameters that a light training changes: all but the convolutions outside of attention.

    These are norms, shifts, embeddings and attention, 11 % of the DDPM++ network for CIFAR-10.
    """
    fixed = {
        f"{name}.weight"
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and "attention" not in name.split(".")
    }
    return {name for name, _ in network.named_parameters()} - fixed
