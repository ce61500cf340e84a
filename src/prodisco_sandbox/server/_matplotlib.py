"""A backend of matplotlib without a display: what is shown is saved as a picture in the workspace.

The code of executions imports it, by name, only where it imports matplotlib.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import matplotlib as mpl
from matplotlib._pylab_helpers import Gcf
from matplotlib.backend_bases import FigureManagerBase
from matplotlib.backends.backend_agg import FigureCanvasAgg

_NAME = "figure-{}.png"
_MOST_FIGURES = 100
"""Figures of one call of show; more are closed unsaved."""


# So that mypy finds the same whether matplotlib is installed or not.
_Manager: Any = FigureManagerBase
_Canvas: Any = FigureCanvasAgg


class FigureManager(_Manager):  # type: ignore[misc]
    """Saves its figure when that is shown: ``figure-1.png``, or the first number that is free."""

    def show(self) -> None:
        for number in itertools.count(1):
            path = os.path.join(getattr(mpl, "sandbox_directory", ""), _NAME.format(number))  # noqa: PTH118
            try:
                with open(path, "xb") as file:  # noqa: PTH123
                    self.canvas.figure.savefig(file, format="png")
            except FileExistsError:
                continue
            return

    @classmethod
    def pyplot_show(cls, *, block: bool | None = None) -> None:
        """What ``plt.show()`` does: saves all open figures, and closes them, as a window would be."""
        managers: list[Any] = Gcf.get_all_fig_managers()
        for manager in managers[:_MOST_FIGURES]:
            manager.show()
        Gcf.destroy_all()


class FigureCanvas(_Canvas):  # type: ignore[misc]
    """Agg's, with the manager above."""

    manager_class = FigureManager
