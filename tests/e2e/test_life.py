"""Sessions whose sandboxes are pods, while all is well."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.patience import until
from tests.support.pods import NAMESPACE, Pods, limits, managed, output, pod_template

pytestmark = pytest.mark.cluster

SECRETS = "/var/run/secrets/kubernetes.io"


async def test_a_session_has_a_pod_from_its_first_call_to_its_close(pods: Pods, session: str) -> None:
    async with managed() as manager:
        async with manager.session(session) as client:
            assert client.sandbox is not None
            name = manager.sandbox_name(session)
            pod = await pods.one(name)
            assert client.sandbox.uid in [owner["uid"] for owner in pod["metadata"]["ownerReferences"]]
            assert client.target == f"{pod['status']['podIP']}:50051"
            assert (
                await output(client, "import socket; print(socket.gethostname())") == pod["metadata"]["name"]
            )
            assert await output(client, f"import os; print(os.path.exists({SECRETS!r}))") == "False"
            await output(client, "open('kept', 'w').write('42')")
            assert await output(client, "print(open('kept').read())") == "42"
            async with client.execute_stream(code="for i in range(3): print(i)") as stream:
                lines = [chunk.text or "" async for chunk in stream]
            assert "".join(lines).split() == ["0", "1", "2"]
        await manager.on_session_closed(session)
        assert await pods.sandbox(name) is None
        stats = manager.stats()
        assert (stats.created, stats.recreated, stats.failed, stats.lost) == (1, 0, 0, 0)
        await pods.going(name)


@pytest.mark.parametrize("endpoint", ["pod-ip", "service"])
async def test_both_endpoints_lead_to_the_pod(pods: Pods, session: str, endpoint: str) -> None:
    async with managed(endpoint=endpoint) as manager:
        client = await manager.get_client(session)
        name = manager.sandbox_name(session)
        pod = await pods.one(name)
        hosts = {"pod-ip": pod["status"]["podIP"], "service": f"{name}.{NAMESPACE}.svc.cluster.local"}
        assert client.target == f"{hosts[endpoint]}:50051"
        assert await output(client, "import socket; print(socket.gethostname())") == pod["metadata"]["name"]


async def test_two_sessions_see_nothing_of_each_other(pods: Pods, session: str) -> None:
    async with managed() as manager:
        one, other = await asyncio.gather(*map(manager.get_client, (session, f"{session}-other")))
        places = "['secret', '/tmp/secret', '/dev/shm/secret']"
        read = f"import os; print(*map(os.path.exists, {places}))"
        written = await one.execute(code=f"for place in {places}: open(place, 'w').write('mine')")
        # Shared memory goes with the execution.
        assert await output(one, read) == "True True False"
        assert await output(other, read) == "False False False"
        assert written.cached is not None
        assert written.cached.name in [entry.name for entry in await one.list_cache()]
        assert written.cached.name not in [entry.name for entry in await other.list_cache()]


async def test_an_idle_session_loses_its_pod(pods: Pods, session: str) -> None:
    async with managed(session_idle_timeout=1.0, idle_check_interval=0.2) as manager:
        first = (await manager.get_client(session)).sandbox
        assert first is not None
        await until(lambda: manager.stats().reaped == 1, "the idle session to be reaped")
        await pods.going(first.name)
        async with manager.session(session) as client:
            assert client.sandbox is not None
            assert client.sandbox.uid != first.uid
            await asyncio.sleep(1.5)  # Past the idle timeout: who is inside is not idle.
            assert await output(client, "print(1)") == "1"
        assert manager.stats().recreated == 1


async def test_20_sessions_at_once(pods: Pods, session: str) -> None:
    # Small ones: the default asks for a tenth of a CPU each, and a test cluster may have two.
    template = pod_template(resources=limits(memory="256Mi"))
    async with managed(max_sessions=20, pod_template_spec=template, ready_timeout=150.0) as manager:
        ids = [f"{session}-{i}" for i in range(20)]

        async def host(session_id: str) -> str:
            client = await manager.get_client(session_id)
            return await output(client, "import socket; print(socket.gethostname())")

        hosts = await asyncio.gather(*map(host, ids))
        names = list(map(manager.sandbox_name, ids))
        found = await asyncio.gather(*map(pods.one, names))
        assert hosts == [pod["metadata"]["name"] for pod in found]
        assert len(set(hosts)) == 20
        await asyncio.gather(*map(manager.on_session_closed, ids))
        assert not any(await asyncio.gather(*map(pods.sandbox, names)))
