"""Benchmarks of what a user waits for: `python -m benchmarks`."""

import ncsn  # noqa: F401 - sets the environment before torch is loaded
