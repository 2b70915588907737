"""How long Ray waits for its own processes, which a busy machine starts slowly. It gives up after 30 or 60 seconds."""

from __future__ import annotations

_SECONDS = "300"
# For the environment of whatever starts or joins a cluster.
PATIENT_RAY = {
    "RAY_raylet_start_wait_time_s": _SECONDS,
    "RAY_worker_register_timeout_seconds": _SECONDS,
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": _SECONDS,
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": _SECONDS,
}
