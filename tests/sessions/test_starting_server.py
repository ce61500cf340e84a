"""An API server that was away lies for a while when it comes back: it forbids everything."""

from __future__ import annotations

import math

import aiohttp
import pytest

from prodisco_sandbox import SandboxFailedError, SandboxPermissionError
from prodisco_sandbox._cluster.metadata import name
from prodisco_sandbox.testing import api_error
from tests.support.managers import LoopTimeApi, alive, left_behind, managed, now, settle

pytestmark = pytest.mark.looptime


async def test_what_nobody_asked_for_before_it_was_away_is_asked_again() -> None:
    async with LoopTimeApi(auto_ready=True) as api:
        async with managed(api) as manager:
            await manager.get_client("s")
            api.faults.add("delete", error=aiohttp.ClientConnectionError, times=1)
            api.faults.add("delete", error=403, times=3)
        assert api.objects == []
        assert api.count("delete") == 5


async def test_one_that_was_back_before_anything_was_asked_was_away_for_the_watch() -> None:
    async with LoopTimeApi(auto_ready=True) as api:
        async with managed(api) as manager:
            await manager.get_client("s")
            api.cut_watches(aiohttp.ClientPayloadError("not all of it came"))
            api.faults.add("delete", error=403, times=3)
            await settle()
        assert api.objects == []
        assert api.count("delete") == 4


async def test_one_that_takes_connections_and_does_not_answer_is_away_too() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        api.faults.add("create", lost=True, times=1)
        api.faults.add("get", error=aiohttp.ClientConnectionError, times=1)
        api.faults.add("get", latency=math.inf, times=1)
        forbidden = api.faults.add("get", error=403, times=2)
        await manager.get_client("s")
        assert now() > 10
        assert api.count("create") == 1
        assert forbidden.hits == 2


async def test_a_lost_create_is_looked_for_until_it_may_be_read() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        api.faults.add("create", lost=True, times=1)
        api.faults.add("get", error=403, times=3)
        await manager.get_client("s")
        assert (api.count("create"), api.count("get")) == (1, 4)


async def test_a_refusal_counts_once_it_has_been_back_for_a_while() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        api.faults.add("create", lost=True, times=1)
        with api.faults.add("get", error=403), pytest.raises(SandboxPermissionError):
            await manager.get_client("s")
        assert 9 < now() < 16


async def test_without_an_absence_a_refusal_counts_at_once() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        api.faults.add("create", error=403)
        with pytest.raises(SandboxPermissionError):
            await manager.get_client("s")
        assert now() < 0.1


DENIED = 'admission webhook "validation.gatekeeper.sh" denied the request: image has no digest'


async def test_a_webhooks_refusal_counts_at_once_whatever_worked_before() -> None:
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        await manager.get_client("before")
        for error in (api_error(403, DENIED), api_error(422, DENIED), api_error(400, DENIED)):
            with api.faults.add("create", error=error) as fault:
                with pytest.raises(SandboxFailedError, match="image has no digest") as caught:
                    await manager.get_client("s")
                assert "needs the rule" not in str(caught.value)
                assert fault.hits == 1
        assert now() < 0.1
        await manager.get_client("s")


async def test_a_webhook_that_could_not_be_called_is_waited_for() -> None:
    calling = 'Internal error occurred: failed calling webhook "w": Post "https://w.n.svc:443/": EOF'
    async with LoopTimeApi(auto_ready=True) as api, managed(api) as manager:
        api.faults.add("create", error=api_error(500, calling), times=3)
        await manager.get_client("s")
        assert (api.count("create"), api.count("get")) == (4, 0), (
            "nothing was stored: there is nothing to look for"
        )


async def test_a_claim_that_a_webhook_refuses_is_an_error_and_costs_nobody_the_sandbox() -> None:
    async with LoopTimeApi() as api, managed(api) as manager:
        left = await left_behind(api, "s", instance="another")
        refusal = api.faults.add("patch", error=api_error(403, DENIED), name=name(left))
        with refusal, pytest.raises(SandboxFailedError, match="image has no digest"):
            await manager.get_client("s")
        assert (now(), alive(api), api.count("delete")) == (0.0, [name(left)], 0)
        await manager.get_client("s")
