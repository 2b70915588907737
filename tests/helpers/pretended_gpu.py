"""A GPU that is not there: what is on "cuda" has a shape, a type and an order, and no values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


@dataclass(frozen=True)
class Call:
    """An operation on the GPU, with all tensors that go in and come out."""

    name: str
    given: list[Tensor]
    made: list[Tensor]
    waits: bool  # whether it is a copy that the host waits for


class PretendedGpu(TorchDispatchMode):
    """Records what it is asked to do, without views. To read a value is an error, but for copies to the CPU: zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._pinned: set[int] = set()  # storages

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        given = _tensors((args, kwargs))
        if func is aten.is_pinned.default:
            return _storage(given[0]) in self._pinned
        if func is aten._pin_memory.default:
            self._pinned.add(_storage(pinned := given[0].clone()))
            return pinned
        if func._can_decompose():  # in inference mode operations come whole
            with self:
                return func.decompose(*args, **kwargs)
        device = kwargs.get("device")
        if not any(isinstance(each, FakeTensor) for each in given) and (device is None or device.type != "cuda"):
            return func(*args, **kwargs)
        with self._fake:
            result = func(*args, **kwargs)
        made = _tensors(result)
        copied = {aten._to_copy.default: 0, aten.copy_.default: 1}.get(func)  # the argument
        waits = copied is not None and args[copied].device.type != made[0].device.type
        if waits and made[0].device.type == "cuda":
            overlaps = kwargs.get("non_blocking", False) or args[2:3] == (True,)
            waits = not overlaps or _storage(args[copied]) not in self._pinned
        if not func.is_view:
            self.calls.append(Call(func.overloadpacket.__name__, given, made, waits))
        if made and made[0].device.type == "cpu":
            return torch.zeros(made[0].shape, dtype=made[0].dtype)
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """What a block does on "cuda" is pretended."""
    torch._C._ensureCUDADeviceGuardSet()  # of FakeTensorMode: where there is no GPU, the guard asks for none
    with pytest.MonkeyPatch.context() as patch, PretendedGpu() as gpu:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        patch.setattr(torch.autograd, "backward", backward)
        patch.setattr(nn.Module, "_apply", _apply)
        yield gpu


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor]) -> nn.Module:
    """New parameters, since a fake one cannot change in place."""
    with torch.no_grad():
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(function(parameter), parameter.requires_grad)
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else function(buffer)
    return module


@torch.no_grad()
def backward(root: Tensor) -> None:
    """`torch.autograd.backward` in Python, since PyTorch's engine asks CUDA for its devices."""
    nodes, waiting = [root.grad_fn], Counter[Any]()  # how many nodes still have a gradient for one
    for node in nodes:
        for following, _ in node.next_functions:
            if following is not None:
                if following not in waiting:
                    nodes.append(following)
                waiting[following] += 1
    gradients: dict[Any, dict[int, Tensor]] = {root.grad_fn: {0: torch.ones_like(root)}}
    ready = [root.grad_fn]
    while ready:
        node = ready.pop()
        found = gradients.pop(node, {})
        given = (
            found[place].sum_to_size(each.shape).to(each.dtype) if place in found else None
            for place, each in enumerate(node._input_metadata)
        )
        result = getattr(node, "apply", node)(*given)  # `apply` is of functions in Python
        made = list(result) if isinstance(result, tuple) else [result]
        while len(made) > len(node.next_functions):  # arguments that are no tensors
            del made[[each is None for each in made].index(True)]
        for (following, place), gradient in zip(node.next_functions, made, strict=True):
            if following is None:
                continue
            if gradient is not None:
                sums = gradients.setdefault(following, {})
                sums[place] = sums[place] + gradient if place in sums else gradient
            waiting[following] -= 1
            if not waiting[following]:
                ready.append(following)
