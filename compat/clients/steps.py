"""What every Python client is asked to do; it runs in the client's own environment."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import traceback
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

COMMAND: list[str] = json.loads(os.environ["COMPAT_COMMAND"])
"""The program on stdio."""
URL = os.environ.get("COMPAT_URL", "")
"""The program over HTTP; empty: on stdio."""
ENV = {name: value for name, value in os.environ.items() if name != "COMPAT_COMMAND"}
TOOL = "run_sandbox"
LOUD = "import time\nfor i in range(3): print(i, flush=True); time.sleep(0.4)"
LONG = "import time; time.sleep(60)"


def read(value: Any) -> dict[str, Any]:
    """The structured result in whatever a client makes of it."""
    if isinstance(value, dict):
        for name in ("structuredContent", "structured_content", "content", "result"):
            if name in value and "success" not in value and "state" not in value:
                return read(value[name])
        return read(value["text"]) if value.keys() >= {"type", "text"} else value
    if isinstance(value, str):
        return read(json.loads(value))
    if isinstance(value, list | tuple):
        for item in value:
            try:
                return read(item)
            except (ValueError, TypeError, AttributeError):
                continue
        raise ValueError(f"no result in {value!r}")
    for name in ("structured_content", "structuredContent", "data", "content", "text"):
        if (inner := getattr(value, name, None)) is not None:
            return read(inner)
    raise ValueError(f"no result in {value!r}")


class Client:
    """What a client can do.

    Args:
        tools: Names of the tools.
        call: Calls the tool with arguments.
        progress: Calls it, and returns the result and how many notifications came; None: it has none.
    """

    def __init__(
        self,
        tools: Callable[[], Awaitable[list[str]]],
        call: Callable[[dict[str, Any]], Awaitable[Any]],
        progress: Callable[[dict[str, Any]], Awaitable[tuple[Any, int]]] | None = None,
    ) -> None:
        self.tools, self._call, self._progress = tools, call, progress
        self._known: dict[str, str] = {}

    async def call(self, **arguments: Any) -> dict[str, Any]:
        result = read(await self._call(self._known | arguments))
        if "sandbox" in result:
            self._known = {"sandbox": result["sandbox"]}
        return result

    # The steps

    async def list(self) -> None:
        assert TOOL in await self.tools()

    async def execute(self) -> None:
        result = await self.call(code="print(6 * 7)")
        assert result["output"] == "42\n", result

    async def progress(self) -> str | None:
        if self._progress is None:
            return "-"
        result, count = await self._progress({"code": LOUD, **self._known})
        assert read(result)["output"] == "0\n1\n2\n", result
        assert count >= 2, f"{count} notifications"
        return None

    async def status(self) -> None:
        started = await self.call(mode="async", code="print('later')")
        found = await self.call(mode="status", execution_id=started["execution_id"], wait=True)
        assert (found["state"], found["output"]) == ("COMPLETED", "later\n"), found

    async def cancel(self) -> None:
        started = await self.call(mode="async", code=LONG)
        assert (await self.call(mode="cancel", execution_id=started["execution_id"]))["success"]
        found = await self.call(mode="status", execution_id=started["execution_id"], wait=True)
        assert found["state"] == "CANCELLED", found

    async def parallel(self) -> None:
        results = await asyncio.gather(*(self.call(code=f"print({n})") for n in (1, 2)))
        assert [result["output"] for result in results] == ["1\n", "2\n"], results

    async def close(self) -> None:
        assert (await self.call(mode="close"))["success"]


def of_session(session: Any) -> Client:
    """A client over a connected session of the Python SDK, 1.x or 2.x."""

    async def tools() -> list[str]:
        return [tool.name for tool in (await session.list_tools()).tools]

    async def progress(arguments: dict[str, Any]) -> tuple[Any, int]:
        came = []

        async def note(*values: Any) -> None:
            came.append(values)

        return await session.call_tool(TOOL, arguments, progress_callback=note), len(came)

    return Client(tools, lambda arguments: session.call_tool(TOOL, arguments), progress)


STEPS = ("list", "execute", "progress", "status", "cancel", "parallel", "close")


def main(connect: Callable[[], AbstractAsyncContextManager[Client]]) -> None:
    """Prints a line of JSON: what became of each step."""
    found: dict[str, str] = {}

    async def run() -> None:
        async with asyncio.timeout(100), connect() as client:
            found["initialise"] = "ok"
            for step in STEPS:
                try:
                    found[step] = await getattr(client, step)() or "ok"
                except Exception:
                    found[step] = "FAILED"
                    traceback.print_exc()
        found["end"] = "ok"

    try:
        asyncio.run(run())
    except BaseException:
        traceback.print_exc()
    print(json.dumps(found), flush=True)
    sys.stdout.flush()
