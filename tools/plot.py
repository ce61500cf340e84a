"""Draws docs/benchmarks.svg from the figures of `make bench`: `make plot`.

An environment of its own has matplotlib, which nothing else here needs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

Figures = list[dict[str, Any]]

NAMES = {
    "floor": "the bare calls",
    "library": "this library",
    "watch_per_session": "a watch per session",
    "polling": "polling",
}
COLOURS = {"floor": "#8c8c8c", "library": "#1f77b4", "watch_per_session": "#ff7f0e", "polling": "#d62728"}


def of_cluster(figures: Figures, scenario: int) -> Figures:
    """The comparisons of a scenario, on a real API server where there was one."""
    compared = [f for f in figures if f["scenario"] == scenario and f["contender"]]
    real = [f for f in compared if f["cluster"] != "in memory"]
    return real or compared


def readiness(axes: Any, figures: Figures) -> None:
    compared = of_cluster(figures, 2)
    medians = {f["contender"]: f["value"] for f in compared if f["what"].endswith("median")}
    p95s = {f["contender"]: f["value"] for f in compared if f["what"].endswith("p95")}
    for values, summary in ((medians, "median"), (p95s, "p95")):
        values["floor"] = next(f["reference"] for f in compared if f["what"].endswith(summary))
    for place, name in enumerate(NAMES):
        axes.barh(place, medians[name], color=COLOURS[name])
        axes.plot([p95s[name]], [place], "|", color="black", markersize=16)
        axes.text(p95s[name] * 1.2, place, f"{medians[name]:.1f} ms", va="center")
    axes.set_yticks(range(len(NAMES)), NAMES.values())
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(1, max(p95s.values()) * 8)
    axes.set_xlabel("ms, median; the mark is p95")
    axes.set_title(f"From ready to a healthy client ({compared[0]['cluster']})")


def at_once(axes: Any, figures: Figures) -> None:
    compared = of_cluster(figures, 3)
    counts = sorted({f["sessions"] for f in compared})
    seconds = {(f["contender"], f["sessions"]): f["value"] for f in compared}
    seconds |= {("floor", f["sessions"]): f["reference"] for f in compared}
    for name in NAMES:
        values = [seconds[name, count] for count in counts]
        axes.plot(counts, values, "o-", color=COLOURS[name], label=NAMES[name])
    for figure in compared:
        if figure["note"]:  # It was stopped before all were ready.
            axes.annotate(figure["note"], (figure["sessions"], figure["value"]), ha="right", va="bottom")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(counts, [f"{n:,}" for n in counts])
    axes.minorticks_off()
    axes.set_xlabel("sessions at once")
    axes.set_ylabel("seconds until all are ready")
    axes.legend(frameon=False)
    axes.set_title(f"Many at once ({compared[0]['cluster']})")


def main(source: str, target: str) -> None:
    figures: Figures = json.loads(Path(source).read_text())
    # The same figures give the same file; text stays text.
    mpl.rcParams.update({"svg.hashsalt": "benchmarks", "svg.fonttype": "none", "font.size": 10})
    drawing, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for axes, draw in ((left, readiness), (right, at_once)):
        draw(axes, figures)
        axes.spines[["top", "right"]].set_visible(False)
    drawing.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
