"""A manager that is killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.support import PROGRAMS, ROOT
from tests.support.patience import PATIENCE


@asynccontextmanager
async def killed(
    kubeconfig: Path, *sessions: str, code: str = "", stubs: bool = False, **settings: Any
) -> AsyncIterator[None]:
    """A manager with a sandbox for each session, in a process that is killed at the end.

    Args:
        kubeconfig: Where; the files that the process leaves are put beside it.
        sessions: Their ids.
        code: Runs in each sandbox.
        stubs: The clients are `StubClient`s, as there are no servers.
        settings: Of the manager, as JSON has them.
    """
    asked = {"sessions": sessions, "code": code, "stubs": stubs, **settings}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, PROGRAMS / "manager.py", json.dumps(asked)),
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "KUBECONFIG": str(kubeconfig),
            "TMPDIR": str(kubeconfig.parent),
        },
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(2 * PATIENCE):
            assert await process.stdout.readline() == b"ready\n"
        yield
    finally:
        process.kill()
        await process.communicate()
    assert process.returncode == -signal.SIGKILL
