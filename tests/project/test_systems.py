"""The library where Linux's own modules, functions and signals are missing; only the server needs Linux."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.patience import PATIENCE

pytestmark = pytest.mark.process

# What others have imported already stays as it is: they know other systems themselves.
ELSEWHERE = """
import asyncio, os, signal, sys
import grpc.aio, grpc_health.v1.health, kubernetes_asyncio.client, structlog
WITH_MCP and __import__("mcp.server")

MODULES = {"fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"}
for name in MODULES:
    sys.modules.pop(name, None)

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
COMMON = {"SIGINT", "SIGTERM", "SIGABRT", "SIGSEGV", "SIG_DFL", "SIG_IGN"}
for name in {name for name in dir(signal) if name.startswith("SIG")} - COMMON:
    delattr(signal, name)
for name in ("pthread_sigmask", "pidfd_send_signal", "sigtimedwait", "valid_signals"):
    delattr(signal, name)
for name in ("O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_PATH", "pidfd_open", "pipe2",
             "fork", "killpg", "getuid", "geteuid", "setsid", "waitid", "sched_getaffinity", "memfd_create"):
    delattr(os, name)
sys.platform = "win32"
"""

SESSIONS = """
import prodisco_sandbox
from prodisco_sandbox import *
from prodisco_sandbox.testing import FakeCustomObjectsApi, FakeSandboxServer

async def main():
    async with FakeSandboxServer() as server, FakeCustomObjectsApi(auto_ready=True) as api:
        config = SandboxManagerConfig(mode="multi", endpoint=lambda _: server.target)
        async with SandboxManager(config, custom_objects_api=api) as manager:
            client = await manager.get_client("s")
            assert (await client.execute("print(1)")).success
            async with client.execute_stream("print(1)") as stream:
                assert [chunk async for chunk in stream]
        assert api.objects == []
        single = SandboxManagerConfig(mode="single", single_target=server.target)
        async with SandboxManager(single) as manager:
            assert (await (await manager.get_client("s")).execute("print(1)")).success

asyncio.run(main())
from prodisco_sandbox.local import LocalCluster
try:
    LocalCluster()
except SandboxError as error:
    print(error)
"""

PROGRAM = """
from prodisco_sandbox.mcp.__main__ import main
sys.exit(main(["--local"]))
"""


def elsewhere(program: str, *, with_mcp: bool) -> subprocess.CompletedProcess[str]:
    code = ELSEWHERE.replace("WITH_MCP", str(with_mcp)) + program
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        stdin=subprocess.DEVNULL,
    )


SENTENCE = (
    "a local cluster needs Linux (/proc, child subreapers), not win32:"
    " run it in a container, or use a cluster"
)


def test_both_modes_and_the_doubles_work_without_what_only_linux_has() -> None:
    done = elsewhere(SESSIONS, with_mcp=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"{SENTENCE}\n")


@pytest.mark.slow
def test_the_program_says_in_a_sentence_that_local_needs_linux() -> None:
    done = elsewhere(PROGRAM, with_mcp=True)
    assert done.returncode == 1
    assert done.stderr.strip().endswith(SENTENCE)
    assert "Traceback" not in done.stderr
