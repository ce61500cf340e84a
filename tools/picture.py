"""Draws a picture of what `make demo` prints: `make picture`.

python tools/picture.py docs/demo.svg <OUTPUT
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

COLOURS = {"alice": "#7ee787", "bob": "#79c0ff", "carol": "#ffa657", "dave": "#ff7b72"}
PLAIN, DIM, BACKGROUND = "#e6edf3", "#8b949e", "#0d1117"
SIZE, HEIGHT, MARGIN, COLUMNS = 14, 21, 20, 96
SPACE = "&#160;"  # Others in a row count as one.
LAST = "The server shuts down"
"""What follows in the demo are shorter scenes of the same kind."""


def draw(output: str) -> str:
    lines = output.partition(LAST)[0].splitlines()[:-1]
    width, height = round(COLUMNS * SIZE * 0.6) + 2 * MARGIN, len(lines) * HEIGHT + 2 * MARGIN
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-size="{SIZE}"'
        ' font-family="ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace">',
        f'<rect width="{width}" height="{height}" rx="8" fill="{BACKGROUND}"/>',
    ]
    for number, line in enumerate(lines, start=1):
        time, text = line[:10], line[10:] if len(line) <= COLUMNS else f"{line[10 : COLUMNS - 1]}…"
        colour = COLOURS.get(text.split()[0], PLAIN)
        weight = "" if colour != PLAIN else ' font-weight="bold"'
        drawn.append(
            f'<text x="{MARGIN}" y="{MARGIN + number * HEIGHT - 6}"><tspan fill="{DIM}">{time}</tspan>'
            f'<tspan fill="{colour}"{weight}>{escape(text).replace(" ", SPACE)}</tspan></text>'
        )
    return "\n".join([*drawn, "</svg>", ""])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(draw(sys.stdin.read()))
