"""What the tests of LocalCluster share: Sandboxes, stand-ins for servers, traces left behind."""

from __future__ import annotations

import asyncio
import datetime as dt
import itertools
import os
import time
from pathlib import Path
from typing import Any

import pytest

from prodisco_sandbox._cluster import manifest, metadata
from prodisco_sandbox.local import LocalCluster, _keeper, _processes
from tests.support.patience import PATIENCE

Object = dict[str, Any]


AT = ("agents.x-k8s.io", "v1beta1", "prodisco", "sandboxes")

# In place of Python: a server that is there at once, and ends when its input does, which begins
# with its token.
STUB = """\
#!/bin/sh
echo "listening on unix:$6"
read -r _ && read -r _
exit 0
"""

_numbers = itertools.count()


def stub(directory: Path, script: str = STUB) -> Path:
    """A program to run in place of the servers' interpreter, in a file beside the directory."""
    path = directory.parent / f"{directory.name}-stub{next(_numbers)}"
    path.write_text(script)
    path.chmod(0o700)
    return path


def make_keepers_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers get so long to end by themselves that no busy machine kills them before."""
    assert hasattr(_keeper, "STOP_GRACE")
    before, main, after = _processes._BOOTSTRAP.partition("sys.exit(keeper.main")
    assert main
    monkeypatch.setattr(_processes, "_BOOTSTRAP", f"{before}keeper.STOP_GRACE = {PATIENCE}\n{main}{after}")


async def create(cluster: LocalCluster, name: str, version: str = "v1beta1", **spec: Any) -> Object:
    body = manifest.SANDBOX.body(cluster.config(), version, name, metadata.session_hash(name))
    body["spec"] |= spec
    at = (AT[0], version, *AT[2:])
    made: Object = await cluster.custom_objects_api.create_namespaced_custom_object(*at, body)
    return made


def condition(sandbox: Object | None, kind: str = "Ready") -> Object:
    conditions = ((sandbox or {}).get("status") or {}).get("conditions") or []
    return next((c for c in conditions if c["type"] == kind), {})


def reason(sandbox: Object | None) -> str | None:
    return condition(sandbox).get("reason")


def in_seconds(seconds: float) -> str:
    """The time then, as spec.shutdownTime has it."""
    return (dt.datetime.now(dt.UTC) + dt.timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")


def processes(directory: Path) -> dict[int, str]:
    """Processes, by their id, that have the directory in their arguments or work in it."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        try:
            place = os.readlink(path / "cwd")
        except OSError:  # It has ended, or keeps this to itself.
            place = ""
        if str(directory) in arguments or place.startswith(str(directory)):
            found[int(path.name)] = arguments.strip()
    found.pop(os.getpid(), None)
    return found


def traces(directory: Path) -> list[str]:
    """Processes of a directory, and the files in it."""
    files = [
        str(Path(parent, name)) for parent, *names in os.walk(directory) for name in itertools.chain(*names)
    ]
    return [*processes(directory).values(), *files]


async def until_gone(directory: Path, timeout: float = PATIENCE) -> None:
    """Waits until there is no trace left.

    Raises:
        AssertionError: There still is; it says what.
    """
    deadline = time.monotonic() + timeout
    while found := traces(directory):
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.01)
