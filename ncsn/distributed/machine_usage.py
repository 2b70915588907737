"""What a worker and its machine are busy with, under the names of MLflow's own system metrics."""

from __future__ import annotations

import psutil
import torch


class MachineUsage:
    """Reads the load since the last reading; each takes about a millisecond.

    Args:
        device: Where the worker computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process()
        psutil.cpu_percent()  # the next reading is since now

    def read(self) -> dict[str, float]:
        """Name `system/<what>` -> value; of GPUs only the worker's own, where it has one."""
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
        try:
            usage[f"{gpu}_utilization_percentage"] = float(torch.cuda.utilization(self._device))
        except Exception:  # noqa: BLE001 - NVIDIA's own library is missing, or does not tell, as of a part of a GPU
            return usage
        return usage
