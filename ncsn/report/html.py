"""The report as one HTML file that loads nothing.

Pictures are `data:` URIs, plots are SVG. A content security policy in the page forbids every request and every script,
whatever its texts contain.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ncsn.report import words

TEMPLATES = Path(__file__).with_name("templates")
# Digest of the templates, which decide how a page looks.
LOOK = hashlib.sha256(b"\0".join(path.read_bytes() for path in sorted(TEMPLATES.iterdir()))).hexdigest()[:16]


def render(**records: Any) -> str:
    """The page of these records, which `templates/report.html.j2` names, as HTML."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "data_uri": lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}",
        "count": lambda number: f"{number:,.0f}",
        "svg": Markup,  # drawn by our own plots
    }
    environment.globals["words"] = words
    style = Markup((TEMPLATES / "report.css").read_text())  # noqa: S704  (our own file)
    return environment.get_template("report.html.j2").render(style=style, **records)
