"""Noise conditional score networks.

The names of `__all__` are described in docs/library.md and stay; other modules may change. Each is loaded when it is
named, so that `import ncsn` loads no torch.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ncsn.core.samplers.settings import AnnealedLangevin, Consistency, DpmSolver, KarrasHeun, Langevin
    from ncsn.errors import UserError
    from ncsn.library.fit import fit
    from ncsn.library.model import ScoreModel

__all__ = ["AnnealedLangevin", "Consistency", "DpmSolver", "KarrasHeun", "Langevin", "ScoreModel", "UserError", "fit"]

# The threads of an operation wait for each other by spinning, for milliseconds. Beside other programs they kept from
# working whom they waited for: a small network took 100 times as long. Read when torch is loaded.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "2000"
    if "torch" in sys.modules:
        from ncsn.process import spin_less

        spin_less()

_MODULES = {"UserError": "ncsn.errors", "fit": "ncsn.library.fit", "ScoreModel": "ncsn.library.model"}

if not TYPE_CHECKING:  # mypy would take every name for one of these

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module 'ncsn' has no attribute {name!r}")
        return getattr(importlib.import_module(_MODULES.get(name, "ncsn.core.samplers.settings")), name)
