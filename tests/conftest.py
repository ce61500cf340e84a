"""What holds for every test: it leaves nothing behind and meets nobody's settings."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from _patience import PATIENCE
from hypothesis import HealthCheck, settings

from prodisco_sandbox.testing import FakeCustomObjectsApi, FakeSandboxServer
from prodisco_sandbox.testing._faults import Fault

# A shared machine makes deadlines fail by chance, and the check of how long examples take to
# draw. In CI a failure must come again, and must not depend on examples that an earlier run kept.
settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, database=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))

# What waits without saying how long waits for what must happen.
for _wait in (FakeCustomObjectsApi.until, FakeSandboxServer.wait_for_call, Fault.reached):
    assert _wait.__kwdefaults__ is not None
    _wait.__kwdefaults__["timeout"] = PATIENCE

_NEEDED = {"envtest": "KUBEBUILDER_ASSETS", "cluster": "E2E_KUBECONFIG"}
_PROXIES = {"http_proxy", "https_proxy", "all_proxy", "no_proxy", "grpc_proxy"}


def pytest_configure() -> None:
    # looptime asks for the current loop in synchronous tests too; before Python 3.14 that
    # makes one, which nobody closes, unless it was said that there is none.
    asyncio.set_event_loop(None)


_WITH_PROCESSES = ("server/", "mcp_tool/", "reliability/", "envtest/", "cluster/", "test_local", "test_demo")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.relative_to(here).as_posix().startswith(_WITH_PROCESSES):
            item.add_marker("process")
        for marker, variable in _NEEDED.items():
            if item.get_closest_marker(marker) and not os.environ.get(variable):
                item.add_marker(pytest.mark.skip(reason=f"{variable} is not set"))


@pytest.fixture(scope="session")
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home directory without a ~/.kube/config that a test could meet by mistake."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _isolated(request: pytest.FixtureRequest, empty_home: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if _is_setting(name):
                patch.delenv(name)
        patch.setenv("HOME", str(empty_home))
        children, files = _children(), _open_files()
        if pytest_asyncio.is_async_test(request.node):
            # Asked for here, so that it ends after every other fixture of the test.
            request.getfixturevalue("_no_task_left")
        yield
        if left := _children() - children:
            pytest.fail(f"child processes left behind: {sorted(left)}")
        if opened := _open_files().items() - files.items():
            pytest.fail(f"files or pipes left open: {sorted(opened)}")


@pytest_asyncio.fixture
async def _no_task_left() -> AsyncIterator[None]:
    yield
    # Looked at before the loop turns: after a test in virtual time every timer is due.
    left = asyncio.all_tasks() - {asyncio.current_task()}
    if ending := {task for task in left if task.cancelling()}:
        left -= ending
        left |= (await asyncio.wait(ending, timeout=PATIENCE))[1]
    if left:
        pytest.fail("tasks left behind: " + ", ".join(sorted(map(repr, left))))


def _is_setting(name: str) -> bool:
    return (
        name.startswith(("SANDBOX_", "KUBERNETES_"))
        or name in ("KUBECONFIG", "K8S_CONTEXT", "SCRIPTS_CACHE_DIR")
        or name.lower() in _PROXIES
    )


def _children() -> set[int]:
    """Processes that this one started and that have not been waited for (Linux only)."""
    pids: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # A thread that just ended.
            pids.update(map(int, path.read_text().split()))
    return pids


def _open_files() -> dict[int, str]:
    """Regular files and pipes that are open, by descriptor (Linux only).

    Not sockets: gRPC closes its own in threads, some time later.
    """
    found: dict[int, str] = {}
    if not Path("/proc/self/fd").is_dir():
        return found
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # The listing's own descriptor.
            target = os.readlink(f"/proc/self/fd/{descriptor}")
            if target.startswith("pipe:") or os.path.isfile(target):
                found[int(descriptor)] = target
    return found
