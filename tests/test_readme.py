"""The examples of README.md's section on tests run."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from prodisco_sandbox import SandboxManager, SandboxManagerConfig

README = Path(__file__).parents[1] / "README.md"


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
