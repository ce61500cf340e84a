"""The scripts in tools/, as modules."""

from __future__ import annotations

import importlib.util
from typing import Any

from tests.support import ROOT


def tool(name: str) -> Any:
    path = ROOT / f"tools/{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
