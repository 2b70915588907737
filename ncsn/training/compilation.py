"""Compilation of the network, which all workers do or none."""

from __future__ import annotations

import os
import shutil

import torch
from torch import nn

from ncsn.errors import UserError
from ncsn.training.context import WorkerContext


def compile_network(network: nn.Module, context: WorkerContext) -> None:
    """Compile the network's forward and backward pass in place; the names of its tensors stay. A collective call.

    Raises:
        UserError: on every worker, if the machine of one has no compiler.
    """
    on_cpu = context.device.type == "cpu"
    compilers = [os.environ.get("CXX", "g++"), "clang++"] if on_cpu else ["cc", "gcc", "clang"]
    lacks = torch.tensor([float(not any(map(shutil.which, compilers)))], device=context.device)
    if context.sum_over_workers(lacks) > 0:
        raise UserError(
            "compute.compile",
            f"needs a compiler on each worker, one of {', '.join(compilers)}",
            hint="install one, or set it to false",
            value=True,
        )
    network.compile()
