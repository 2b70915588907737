"""Noise conditional score networks.

The names of `__all__` are described in docs/library.md and stay; other modules may change. Each is loaded when it is
named, so that `import ncsn` loads no torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ncsn.core.samplers.settings import AnnealedLangevin, Consistency, DpmSolver, KarrasHeun, Langevin
    from ncsn.errors import UserError
    from ncsn.library.fit import fit
    from ncsn.library.model import ScoreModel

__all__ = ["AnnealedLangevin", "Consistency", "DpmSolver", "KarrasHeun", "Langevin", "ScoreModel", "UserError", "fit"]

_MODULES = {"UserError": "ncsn.errors", "fit": "ncsn.library.fit", "ScoreModel": "ncsn.library.model"}

if not TYPE_CHECKING:  # mypy would take every name for one of these

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module 'ncsn' has no attribute {name!r}")
        return getattr(importlib.import_module(_MODULES.get(name, "ncsn.core.samplers.settings")), name)
