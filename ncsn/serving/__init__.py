"""A registered model behind HTTP: requests, batches of several of them, and the version that an alias names."""

from __future__ import annotations

import os

import ncsn.distributed  # noqa: F401 - before Ray, which reads on import that it stays on loopback

PROXY = {  # variables that Ray Serve reads
    # It gives its proxy five seconds to start, which takes longer on a busy machine, and ends it otherwise.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "ncsn.serving.connections.limit",
}
for name, value in PROXY.items():
    os.environ.setdefault(name, value)  # for a cluster that this process starts
