"""What a user waits for, measured: `python -m benchmarks`."""

import ncsn  # noqa: F401 - before torch is loaded, for what it sets
