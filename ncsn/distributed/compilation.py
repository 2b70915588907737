"""Compiling the network."""

from __future__ import annotations

import os
import shutil

import torch
from torch import nn


def compile_network(network: nn.Module, device: torch.device) -> None:
    """Compile the network's forward and backward pass in place; its class and the names of its tensors stay.

    Raises:
        ValueError: if there is no compiler for `device` on this machine.
    """
    compilers = [os.environ.get("CXX", "g++"), "clang++"] if device.type == "cpu" else ["cc", "gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        raise ValueError(
            f"compute.compile = true needs a compiler on each worker, one of {', '.join(compilers)}; install one or "
            "use compute.compile = false"
        )
    network.compile()
