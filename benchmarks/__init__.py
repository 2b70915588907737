"""Benchmarks of what a user waits for: `python -m benchmarks`."""

import ncsn.distributed  # noqa: F401 - sets the environment before torch is loaded
