"""What a training shows as it goes: where its curves and pictures go, and the usage of the machine."""

from __future__ import annotations

from contextlib import suppress
from typing import Protocol

import psutil
import torch


class LiveSink(Protocol):
    """Receives the curves and pictures of rank 0. Must neither block nor raise."""

    def log(self, metrics: dict[str, float], images_seen: int, when: int) -> None:
        """Take one point of each curve; `when` is in milliseconds since 1970."""

    def log_picture(self, png: bytes, name: str, images_seen: int, when: int) -> None:
        """Take one picture of a series."""

    def close(self) -> object:
        """Send the remaining entries."""


class MachineUsage:
    """Load of the machine since the last reading. A reading takes about a millisecond."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process()
        psutil.cpu_percent()  # starts the first interval

    def read(self) -> dict[str, float]:
        """Name `system/...` -> value; of GPUs only the worker's own."""
        memory = psutil.virtual_memory()
        usage = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": memory.used / 1e6,
            "system/system_memory_usage_percentage": memory.percent,
            "system/worker_memory_megabytes": self._process.memory_info().rss / 1e6,
        }
        return usage | self._gpu() if self._device.type == "cuda" else usage

    def _gpu(self) -> dict[str, float]:
        free, total = torch.cuda.mem_get_info(self._device)
        gpu = f"system/gpu_{self._device.index or 0}"
        usage = {
            f"{gpu}_memory_usage_megabytes": (total - free) / 1e6,
            f"{gpu}_memory_usage_percentage": 100 * (total - free) / total,
            f"{gpu}_memory_peak_megabytes": torch.cuda.max_memory_allocated(self._device) / 1e6,
        }
        with suppress(Exception):  # NVIDIA's library is missing, or this is a part of a GPU
            usage[f"{gpu}_utilization_percentage"] = float(torch.cuda.utilization(self._device))
        return usage
