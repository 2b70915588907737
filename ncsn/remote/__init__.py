"""Steps on a cluster elsewhere. The only package that imports the Kubernetes client, and Ray's Jobs client."""

from __future__ import annotations

import os
import sys

if "ray" not in sys.modules and {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
    # Who has a token means to show it; Ray decides when it is imported, and its default is not to.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
