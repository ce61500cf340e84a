"""What holds for the manager's tests on the fake API."""

from __future__ import annotations

import asyncio

import pytest

from prodisco_sandbox.testing import FakeCustomObjectsApi


@pytest.fixture(autouse=True)
def _no_time_but_the_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The API's wall clock is the loop's, as the managers' is: leases would be long over in any other."""
    defaults = FakeCustomObjectsApi.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "now", lambda: asyncio.get_running_loop().time())
    # Tests of what a pod shows on its way out say how long that takes; no other waits for it.
    monkeypatch.setitem(defaults, "pod_termination", 0.0)
