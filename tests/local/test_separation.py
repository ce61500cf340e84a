"""LocalCluster: what the code of one sandbox can do to another, and to its server."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from prodisco_sandbox import SandboxClient, SandboxManager, SandboxPermissionError
from prodisco_sandbox._targets import GuardedTarget
from prodisco_sandbox.local import LocalCluster
from prodisco_sandbox.proto import metadata as names
from prodisco_sandbox.server import _confine, _tree
from tests.support.local import stub
from tests.support.patience import PATIENCE
from tests.support.servers import needs_bubblewrap, needs_landlock


class Two:
    """Two sessions of one cluster: the code of one attacks the other, which keeps a secret."""

    def __init__(self, cluster: LocalCluster, attacker: SandboxClient, victim: SandboxClient) -> None:
        self.cluster, self.attacker, self.victim = cluster, attacker, victim
        self.home = Path(victim.target.removeprefix("unix:")).parent
        target = victim.target
        assert isinstance(target, GuardedTarget)
        self.token = target.token

    @property
    def server(self) -> int:
        """The process of the victim's server."""
        [found] = [
            pid
            for pid in _tree.descendants([os.getpid()])
            if f"{self.home}/socket".encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        ]
        return found

    async def attack(self, expressions: list[str]) -> dict[str, str]:
        """What each expression comes to in the attacker's code: its value, or its error's class."""
        source = f"""
import ctypes, json, os, signal, socket, subprocess, tempfile
found = {{}}
for expression in {expressions!r}:
    try:
        found[expression] = repr(eval(expression))
    except Exception as error:
        found[expression] = type(error).__name__
print(json.dumps(found))
"""
        result = await self.attacker.execute(code=source)
        assert result.success, result
        outcomes: dict[str, str] = json.loads(result.output)
        return outcomes


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def two(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Two]:
    cluster = LocalCluster(directory=tmp_path_factory.mktemp("base"))
    async with (
        cluster,
        SandboxManager(
            cluster.config(ready_timeout=PATIENCE), custom_objects_api=cluster.custom_objects_api
        ) as manager,
    ):
        clients = await asyncio.gather(manager.get_client("a"), manager.get_client("b"))
        found = Two(cluster, *clients)
        await found.victim.execute(code="open('secret', 'w').write('s3cret')")
        yield found
        still = "print(open('secret').read(), os.listdir())"
        assert (await found.victim.execute(code=f"import os\n{still}")).output == "s3cret ['secret']\n"


ATTACKS = [
    "open('{home}/workspace/secret').read()",
    "open('{home}/workspace/secret', 'w').write('mine')",
    "open('{home}/workspace/planted', 'w')",
    "os.unlink('{home}/workspace/secret')",
    "os.rename('{home}/workspace/secret', 'secret')",
    "os.link('{home}/workspace/secret', 'secret')",
    "(os.symlink('{home}/workspace', 'link'), open('link/secret').read())",
    "os.truncate('{home}/workspace/secret', 0)",
    "os.listdir('{home}/workspace')",
    "os.listdir('{home}')",
    "os.listdir('{root}')",
    "os.listdir('{base}')",
    "open('{home}/server.log').read()",
    "os.mkdir('{root}/99')",
    "subprocess.run(['cat', '{home}/workspace/secret'], capture_output=True, check=True)",
    "open('/proc/self/root{home}/workspace/secret').read()",
    "open('/proc/{server}/cwd/workspace/secret').read()",
    "open('/proc/{server}/root{home}/workspace/secret').read()",
    "os.chdir('/proc/{server}/cwd')",
    "open('/proc/{server}/environ').read()",
    "open('/proc/{server}/mem').read(1)",
    "open('/proc/{server}/maps').read()",
    "os.readlink('/proc/{server}/fd/0')",
    "open('/proc/{server}/fd/0').read()",
    "open('/proc/{manager}/mem').read(1)",
    "open('/proc/{manager}/environ').read()",
    "os.kill({server}, 0)",
    "os.kill({server}, signal.SIGKILL)",
    "'traced' if ctypes.CDLL(None).ptrace(16, {server}, 0, 0) == 0 else os.kill({server}, 0)",
]


@needs_landlock
@pytest.mark.asyncio(loop_scope="module")
async def test_attacks_are_refused(two: Two) -> None:
    places = {
        "home": two.home,
        "root": two.cluster.directory,
        "base": two.cluster.directory.parent,
        "server": two.server,
        "manager": os.getpid(),
    }
    outcomes = await two.attack([attack.format(**places) for attack in ATTACKS])
    refusals = ("PermissionError", "OSError", "CalledProcessError")
    assert {attack: outcome for attack, outcome in outcomes.items() if outcome not in refusals} == {}


@needs_landlock
@pytest.mark.asyncio(loop_scope="module")
async def test_what_is_not_another_sandbox_s_stays_as_it_was(two: Two) -> None:
    useful = [
        "open('own', 'w').write('x') and open('own').read() and os.unlink('own')",
        "tempfile.mkdtemp() and None",
        "os.listdir('/usr') and os.listdir('/proc') and os.listdir('/etc') and None",
        "__import__('multiprocessing').Lock() and None",
        "subprocess.run(['true'], check=True) and None",
        "__import__('grpc') and None",
    ]
    assert set((await two.attack(useful)).values()) == {"None"}


CALL = """
import sys
try:
    import grpc
except ImportError:
    sys.exit(3)
from prodisco_sandbox.proto import sandbox_pb2, sandbox_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
with grpc.insecure_channel("unix:{socket}", options=[("grpc.default_authority", "localhost")]) as channel:
    for method, request in (
        (sandbox_pb2_grpc.SandboxServiceStub(channel).Execute, sandbox_pb2.ExecuteRequest(code="1")),
        (health_pb2_grpc.HealthStub(channel).Check, health_pb2.HealthCheckRequest()),
    ):
        try:
            method(request, timeout=20, metadata={metadata})
        except grpc.RpcError as error:
            print(error.code().name)
        else:
            print("OK")
"""


@needs_landlock
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("guesses", [[], [""], ["0" * 64], ["0" * 64] * 2])
async def test_calls_of_another_sandbox_s_server_are_refused(two: Two, guesses: list[str]) -> None:
    metadata = tuple((names.TOKEN, guess) for guess in guesses)
    source = CALL.format(socket=f"{two.home}/socket", metadata=metadata)
    result = await two.attacker.execute(code=source, timeout=60)
    assert result.output == "UNAUTHENTICATED\n" * 2, result


@needs_landlock
@pytest.mark.asyncio(loop_scope="module")
async def test_the_token_is_only_the_cluster_s(two: Two) -> None:
    """It is in nothing of the server's that /proc shows, to whomever."""
    for name in ("cmdline", "environ"):
        assert two.token.encode() not in Path(f"/proc/{two.server}/{name}").read_bytes()
    logs = [path.read_text() for path in two.cluster.directory.glob("*/server.log")]
    assert logs
    assert not any(two.token in text for text in logs)
    assert two.token not in repr(two.victim)
    async with SandboxClient(str(two.victim.target)) as stranger:
        with pytest.raises(SandboxPermissionError, match="lacks this server's token"):
            await stranger.execute(code="")


# What does not need Landlock


@pytest.mark.slow
@needs_bubblewrap
async def test_in_namespaces_nothing_of_another_sandbox_is_there(tmp_path: Path) -> None:
    cluster = LocalCluster(directory=tmp_path, server_args=["--isolation", "bwrap"], warm=1)
    settings = cluster.config(ready_timeout=PATIENCE)
    async with cluster, SandboxManager(settings, custom_objects_api=cluster.custom_objects_api) as manager:
        for name in "ab":
            client = await manager.get_client(name)
            source = (
                f"import os; open('own', 'w'); print(os.listdir(), os.path.exists({client.target[5:]!r}))"
            )
            assert (await client.execute(code=source)).output == "['own'] False\n"
            seen = await client.execute(code=f"import os; print(os.listdir({str(cluster.directory)!r}))")
            own = Path(client.target.removeprefix("unix:")).parent.name
            assert seen.output == f"[{own!r}]\n"


async def test_a_cluster_without_landlock_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shared = "sandboxes_not_separated landlock=0 reason='the code of a sandbox can read the files, and signal"
    cases: list[tuple[int, list[str], str]] = [
        (0, [], shared),
        (5, [], "the code of a sandbox can signal the servers of others"),
        (_confine.LANDLOCK_SCOPES, [], ""),
        (0, ["--isolation", "bwrap"], ""),
    ]
    for version, args, text in cases:
        monkeypatch.setattr(_confine, "landlock_version", lambda found=version: found)
        async with LocalCluster(directory=tmp_path, python=stub(tmp_path), server_args=args):
            pass
        assert [text in record.getMessage() for record in caplog.records] == ([True] if text else [])
        caplog.clear()
