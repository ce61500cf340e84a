"""What holds for every test: it leaves nothing behind, and depends on nothing that it inherits."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
import os
import signal
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import trustme
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

from tests.support.leftovers import children, kept_open, left_running, open_files
from tests.support.measuring import import_libraries, unmeasured
from tests.support.patience import PATIENCE

# A shared machine makes deadlines fail by chance, and the check of how long examples take to
# draw. In CI a failure must come again, and must not depend on examples that an earlier run kept.
_SLOW: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", **_SLOW, max_examples=30)
settings.register_profile("ci", **_SLOW, derandomize=True, database=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))

_NEEDED = {
    "envtest": ("KUBEBUILDER_ASSETS",),
    "controller": ("KUBEBUILDER_ASSETS", "AGENT_SANDBOX_DIR", "AGENT_SANDBOX_PODS"),
    "cluster": ("E2E_KUBECONFIG",),
}


_LOGGER = logging.getLogger("prodisco_sandbox")
# Unix sockets hold 107 bytes, and pytest's own directories and the clusters' come below this one.
_LONGEST_TMPDIR = 24
_numbers = itertools.count()


def pytest_configure(config: pytest.Config) -> None:
    # looptime asks for the current loop in synchronous tests too; before Python 3.14 that
    # makes one, which nobody closes, unless it was said that there is none.
    asyncio.set_event_loop(None)
    _start_children_with_default_signals()
    if len(os.fsencode(tempfile.gettempdir())) > _LONGEST_TMPDIR:
        os.environ["PYTEST_DEBUG_TEMPROOT"] = "/tmp"  # Where pytest makes its directories.
    for plugin in config.pluginmanager.get_plugins():
        # looptime's own compares all names of pytest-asyncio at the setup of every fixture: a fifth of
        # the time of a short test.
        if hasattr(plugin, "_should_patch"):
            plugin._should_patch = _is_of_pytest_asyncio
    if config.getoption("dist", "no") == "no":  # This process collects tests.
        import_libraries()


def _is_of_pytest_asyncio(fixture: pytest.FixtureDef[Any], _request: pytest.FixtureRequest) -> bool:
    return fixture.func.__module__ == pytest_asyncio.plugin.__name__


def _start_children_with_default_signals() -> None:
    """A job in the background, or under nohup, inherits ignored signals, and so would every child.

    A handled signal has its default again after exec; this run itself still ignores it.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:  # Python ignores these itself.
        if signal.getsignal(number) is signal.SIG_IGN:
            default = number == signal.SIGCHLD
            signal.signal(number, signal.SIG_DFL if default else lambda *_: None)


_WITH_PROCESSES = (
    *("server/", "mcp/", "local/", "reliability/", "envtest/", "controller/", "e2e/"),
    "project/test_demo",
)
# Each set in one worker: they share what takes seconds to start.
_TOGETHER = (
    *("envtest/", "controller/", "project/test_demo", "local/test_separation"),
    *(f"server/test_{name}" for name in ("executions", "fences", "queue", "token", "zygote")),
)


# Before each step of its time looptime turns the loop 42 times, with nothing to do.
_ONE_EMPTY_TURN = pytest.mark.looptime(noop_cycles=0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = f"{Path(__file__).parent}/"
    missing = {
        marker: next((name for name in variables if not os.environ.get(name)), None)
        for marker, variables in _NEEDED.items()
    }
    for item in items:
        if str(item.path).removeprefix(here).startswith(_WITH_PROCESSES):
            item.add_marker("process")
        for name in {mark.name for mark in item.iter_markers()}:
            if name == "looptime":
                item.add_marker(_ONE_EMPTY_TURN)
            elif missing.get(name):
                item.add_marker(pytest.mark.skip(reason=f"{missing[name]} is not set"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keeps the garbage collector from modules and collected tests: it takes a third of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """Gives workers one test after another, but each set of `_TOGETHER` to one of them, and those first.

    Not --dist=loadgroup, which does not group any more: github.com/pytest-dev/pytest-xdist/issues/1386.
    """
    return _Scheduling(config, log)


class _Scheduling(LoadScopeScheduling):  # type: ignore[misc]
    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.removeprefix("tests/")
        return next(filter(path.startswith, _TOGETHER), nodeid)

    def mark_test_complete(self, node: WorkerController, item_index: int, duration: float = 0) -> None:
        super().mark_test_complete(node, item_index, duration)
        # At each test it counts the tests of all units that the worker ever got.
        scope = self._split_scope(self.registered_collections[node][item_index])
        if all(self.assigned_work[node][scope].values()):
            del self.assigned_work[node][scope]


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """A worker cannot send text with lone surrogates, such as file names hold: it would die of a failure."""
    return _sendable((yield))


def _sendable(value: Any) -> Any:
    match value:
        case str():
            return value.encode("utf-8", "backslashreplace").decode()
        case dict():
            return {_sendable(key): _sendable(item) for key, item in value.items()}
        case list() | tuple():
            return type(value)(map(_sendable, value))
    return value


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_auto_num_workers() -> Generator[None, int, int]:
    """One more than there are cores, as many tests wait; four at most, as each has servers of its own."""
    cores = yield
    return min(cores + 1, 4)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fails a test that skips though PRODISCO_MUST_RUN lists one of its markers."""
    report = yield
    required = os.environ.get("PRODISCO_MUST_RUN", "").split()
    if report.skipped and not hasattr(report, "wasxfail") and any(map(item.get_closest_marker, required)):
        report.outcome = "failed"
        report.longrepr = f"skipped, which PRODISCO_MUST_RUN forbids: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with unmeasured() if item.get_closest_marker("unmeasured") else contextlib.nullcontext():
        yield


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Says what was skipped: after pytest's closing line, or in the file that SKIPPED_FILE names."""
    yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # In a worker.
        return
    line = _skipped(reporter.stats.get("skipped", ()))
    if path := os.environ.get("SKIPPED_FILE"):
        Path(path).write_text(f"{line}\n")
    else:
        reporter.write_line(line)


def _skipped(reports: Iterable[pytest.TestReport]) -> str:
    """``skipped: 15 cluster (E2E_KUBECONFIG is not set), 3 (bubblewrap is not installed)``."""
    counts: Counter[tuple[str, str]] = Counter()
    for report in reports:
        assert isinstance(report.longrepr, tuple)
        kind = next((f"{marker} " for marker in _NEEDED if marker in report.keywords), "")
        counts[kind, report.longrepr[2].removeprefix("Skipped: ")] += 1
    parts = (f"{count} {kind}({reason})" for (kind, reason), count in counts.most_common())
    return f"skipped: {', '.join(parts) or 'nothing'}"


_MEASURING = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}
# Besides the project's own: what changes where clients connect, how text is laid out, or how
# Python children behave.
_REMOVED = {
    *("KUBECONFIG", "K8S_CONTEXT", "SCRIPTS_CACHE_DIR", "NETRC"),
    *("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "SKIPPED_FILE"),
    *_MEASURING,
}
_REMOVED_PREFIXES = ("SANDBOX_", "KUBERNETES_", "GRPC_", "PYTHON")
_PROXIES = {"http_proxy", "https_proxy", "all_proxy", "no_proxy", "grpc_proxy"}


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No settings but the tests' own, and a home directory without a ~/.kube/config."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name in _REMOVED or name.startswith(_REMOVED_PREFIXES) or name.lower() in _PROXIES:
                patch.delenv(name)
        home = tmp_path_factory.mktemp("home")
        patch.setenv("HOME", str(home))
        # A TLS context takes 60 ms to load the machine's authorities, and tests trust none of them.
        trustme.CA().cert_pem.write_to_path(str(home / "authorities"))
        patch.setenv("SSL_CERT_FILE", str(home / "authorities"))
        yield


@pytest.fixture
def measured_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python processes that a test starts are measured for coverage, too.

    That costs each a quarter of a second, and no others need it: the server is not measured.
    """
    for name, value in _MEASURING.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As pytest's, but without the test's name: it is for Unix sockets, too."""
    path = tmp_path_factory.getbasetemp() / str(next(_numbers))
    path.mkdir(0o700)
    return path


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    children_before, files_before, level_before = children(), open_files(), _LOGGER.level
    if pytest_asyncio.is_async_test(request.node):
        # Asked for here, so that it ends after every other fixture of the test.
        request.getfixturevalue("_no_task_left")
    yield
    if level_before != _LOGGER.level:
        pytest.fail(f"the log level {_LOGGER.level} left behind")
    if left := left_running(children_before):
        pytest.fail(f"child processes left behind: {left}")
    if kept := kept_open(files_before):
        pytest.fail(f"files or pipes left open: {kept}")


@pytest_asyncio.fixture
async def _no_task_left() -> AsyncIterator[None]:
    yield
    # Looked at before the loop turns: after a test in virtual time every timer is due.
    left = asyncio.all_tasks() - {asyncio.current_task()}
    if ending := {task for task in left if task.cancelling() or _awaits_status(task)}:
        left -= ending
        left |= (await asyncio.wait(ending, timeout=PATIENCE))[1]
    if left:
        pytest.fail("tasks left behind: " + ", ".join(sorted(map(repr, left))))


def _awaits_status(task: asyncio.Task[object]) -> bool:
    """Whether it is gRPC's own: a thread ends it a moment after the call was cancelled."""
    return "_handle_status_once_received" in getattr(task.get_coro(), "__qualname__", "")
