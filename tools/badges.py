"""Draws README's badges from what the repository says of itself.

    python tools/badges.py DIRECTORY

Pictures of our own: the site and README load nothing from elsewhere. A test compares them.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def badges() -> dict[str, tuple[str, str]]:
    """The label and the text of each badge, by the name of its file."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    classifiers = settings["project"]["classifiers"]
    makefile = (ROOT / "Makefile").read_text()
    checkers = [name for name in ("mypy", "pyright") if re.search(rf"tests/user && .* -m {name} ", makefile)]
    support = (ROOT / "docs/support.md").read_text()

    def tested(thing: str) -> str:
        [row] = re.findall(rf"^\| {thing} \|[^|]*\| ([^|]*) \|", support, re.MULTILINE)
        versions = row.split(", ")
        return f"{versions[0]} to {versions[-1]}"

    pythons = [found[1] for text in classifiers if (found := re.search(r":: (3\.\d+)$", text))]
    return {
        "python": ("Python", " | ".join(pythons)),
        "agent-sandbox": ("agent-sandbox", tested("agent-sandbox")),
        "kubernetes": ("Kubernetes", tested("Kubernetes")),
        "typed": ("typed", f"{' and '.join(checkers)}, strict"),
        "coverage": ("branch coverage", f"at least {settings['tool']['coverage']['report']['fail_under']} %"),
        "licence": ("licence", settings["project"]["license"]),
    }


def draw(label: str, text: str) -> str:
    left, right = (round(5.9 * len(part)) + 14 for part in (label, text))
    style = (
        'y="14" fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" text-anchor="middle"'
    )
    width = left + right
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" aria-label="{label}: {text}">
<clipPath id="round"><rect width="{width}" height="20" rx="3"/></clipPath>
<g clip-path="url(#round)">
<rect width="{left}" height="20" fill="#555"/>
<rect x="{left}" width="{right}" height="20" fill="#1f6feb"/>
</g>
<text x="{left / 2}" textLength="{left - 14}" {style}>{label}</text>
<text x="{left + right / 2}" textLength="{right - 14}" {style}>{text}</text>
</svg>
"""


def main() -> None:
    [directory] = map(Path, sys.argv[1:])
    directory.mkdir(exist_ok=True)
    for name, parts in badges().items():
        (directory / f"{name}.svg").write_text(draw(*parts))


if __name__ == "__main__":
    main()
