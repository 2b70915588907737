"""Noise conditional score networks."""

import os

# The threads of an operation wait for each other by spinning, for milliseconds: beside other programs, which they keep
# from working, a small network took 400 times as long. Read when torch is loaded (docs/decisions/0056).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
