"""Noise conditional score networks."""

import os

# The threads of an operation wait for each other by spinning, for milliseconds. Beside other programs they kept from
# working whom they waited for: a small network took 100 times as long. Read when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
