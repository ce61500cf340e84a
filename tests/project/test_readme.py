"""The examples of README.md run: the first program, and those of the section on tests."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prodisco_sandbox import SandboxManager, SandboxManagerConfig
from tests.support import ROOT
from tests.support.patience import PATIENCE

README = ROOT / "README.md"


async def my_tool(manager: SandboxManager, *, session_id: str, code: str) -> None:
    async with manager.session(session_id) as client:
        assert (await client.execute(code=code)).success


def examples() -> dict[str, Any]:
    section = README.read_text().partition("## Testing your own server")[2]
    found: dict[str, Any] = {
        "SandboxManager": SandboxManager,
        "SandboxManagerConfig": SandboxManagerConfig,
        "my_tool": my_tool,
    }
    for example in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(example, found)
    return {
        name: test
        for name, test in found.items()
        if inspect.iscoroutinefunction(test) and test is not my_tool
    }


@pytest.mark.parametrize("name", examples())
async def test_an_example(name: str) -> None:
    assert name.startswith("test_")
    await examples()[name]()


@pytest.mark.process
def test_the_first_example_is_a_program_that_runs(tmp_path: Path) -> None:
    found = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert found is not None
    (program := tmp_path / "first.py").write_text(found[1])
    done = subprocess.run(
        [sys.executable, str(program)], check=True, capture_output=True, text=True, timeout=PATIENCE
    )
    first, _, rest = done.stdout.partition("\n")
    assert first == "42"
    assert "kind='output'" in rest
    assert rest.count("kind='result'") == 1
    assert done.stderr == ""


def test_the_badges_are_those_that_the_script_draws() -> None:
    script = importlib.import_module("tools.badges")
    badges = script.badges()
    drawn = {f"{name}.svg": script.draw(*parts) for name, parts in badges.items()}
    assert drawn == {path.name: path.read_text() for path in ROOT.glob("docs/badges/*")}
    shown = re.findall(r"!\[(.*?)\]\(docs/badges/(.*?)\.svg\)", README.read_text())
    assert shown == [(f"{label}: {text}", name) for name, (label, text) in badges.items()]
