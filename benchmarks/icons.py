"""Emoji of one code point as icons of 72x72 pixels with a transparent background, in a folder for each group.

    apt-get install fonts-noto-color-emoji unicode-data
    python -m benchmarks.icons OUT
    python -m benchmarks.icons OUT --flat      # in one folder, so without classes

Icons of the same pixels, as those of a few old signs are, are written once.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
LIST = Path("/usr/share/unicode/emoji/emoji-test.txt")
DRAWN = 136  # pixels that the font of 109 points has
SIZE = 72  # pixels that are written


def icons() -> dict[str, tuple[str, Image.Image]]:
    """Group and icon by code point."""
    font = ImageFont.truetype(FONT, 109)
    made: dict[str, tuple[str, Image.Image]] = {}
    seen: set[bytes] = set()
    group = ""
    for line in LIST.read_text().splitlines():
        if line.startswith("# group: "):
            group = re.sub(r"[^a-z]+", "-", line.removeprefix("# group: ").lower())
        elif found := re.match(r"([0-9A-F]+)(?: FE0F)? +; fully-qualified", line):
            icon = Image.new("RGBA", (DRAWN, DRAWN), (0, 0, 0, 0))
            ImageDraw.Draw(icon).text((0, 4), chr(int(found[1], 16)), font=font, embedded_color=True)
            icon = icon.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            if icon.getbbox() and icon.tobytes() not in seen:
                seen.add(icon.tobytes())
                made[found[1].lower()] = group, icon
    return made


def main() -> None:
    """Write them as PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--flat", action="store_true")
    options = parser.parse_args()
    for point, (group, icon) in icons().items():
        folder = options.out if options.flat else options.out / group
        folder.mkdir(parents=True, exist_ok=True)
        icon.save(folder / f"{point}.png")


if __name__ == "__main__":
    main()
