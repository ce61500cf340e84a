"""Session ids are as good as credentials, and as hostile as whoever sends them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import random
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prodisco_sandbox import SandboxError, SandboxManager, SandboxManagerConfig, TlsConfig
from prodisco_sandbox._cluster.manifest import SANDBOX
from prodisco_sandbox._cluster.metadata import LABEL_SESSION, labels, session_hash
from prodisco_sandbox._targets import grpc_address
from tests.support.counts import count, tries
from tests.support.managers import LoopTimeApi, StubClient, alive, left_behind, managed

from .test_failures import FAILURES, MARK, OTHER, SESSION, Failure, World, world

CONFIG = SandboxManagerConfig(mode="multi", instance_id="me")
DNS_LABEL = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
LABEL_VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


# Names


def checked(session_id: str) -> tuple[str, str]:
    name, value = SANDBOX.name(session_id), session_hash(session_id)
    assert DNS_LABEL.fullmatch(name), session_id
    assert LABEL_VALUE.fullmatch(value), session_id
    return name, value


@given(st.text(min_size=1) | st.text(st.characters(), min_size=1, max_size=300))
def test_whatever_the_id_the_body_is_as_another_ids(session_id: str) -> None:
    name, value = checked(session_id)
    body = json.dumps(SANDBOX.body(CONFIG, "v1beta1", name, value))
    plain = json.dumps(SANDBOX.body(CONFIG, "v1beta1", *checked("x")))
    assert body.replace(name, SANDBOX.name("x")).replace(value, session_hash("x")) == plain


def hostile_ids(seed: int, number: int) -> Iterator[str]:
    """Ids, no two alike: random text, and what differs from an earlier one by almost nothing."""
    chance, given_out, last = random.Random(seed), set[str](), "x"
    variants = [
        lambda: chance.randbytes(16).hex(),
        lambda: "".join(chr(chance.randrange(1, 0x110000)) for _ in range(chance.randrange(1, 40))),
        lambda: "".join(chance.choice(" ./\\\0\n\r\t'\"%{}$;`-_:=,") for _ in range(chance.randrange(1, 60))),
        lambda: last + chance.choice([" ", "\0", "\n", "\u200b", "\u0301", "\ud800", "-1", "="]),
        lambda: chance.choice([" ", "\0", "../", "-"]) + last,
        lambda: last.swapcase(),
        lambda: last[::-1],
        lambda: unicodedata.normalize(chance.choice(["NFC", "NFD", "NFKC", "NFKD"]), last),
        lambda: session_hash(last),
        lambda: SANDBOX.name(last),
        lambda: last * 2 if len(last) < 5_000 else "y",
    ]
    while len(given_out) < number:
        candidate = chance.choice(variants)()
        if candidate and candidate not in given_out:
            given_out.add(candidate)
            last = candidate
            yield candidate


def test_no_two_of_many_ids_meet() -> None:
    names, values, number = set(), set(), tries(2_000, quick=500)
    for session_id in hostile_ids(number, number):
        name, value = checked(session_id)
        assert session_id in (name, value) or len(session_id) < 4 or session_id not in name + value
        names.add(name)
        values.add(value)
        count("session ids")
    assert (len(names), len(values)) == (number, number)
    assert names.isdisjoint(values)


@pytest.mark.looptime
async def test_hostile_ids_get_sandboxes_of_their_own(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    ids = list(hostile_ids(1, tries(2_000, quick=500) // 50))
    async with LoopTimeApi(auto_ready=True) as api, managed(api, max_sessions=len(ids)) as manager:
        clients = await asyncio.gather(*map(manager.get_client, ids))
        assert len(set(clients)) == len(alive(api)) == len(ids)
        for session_id, client in zip(ids, clients, strict=True):
            found = api.get(client.sandbox.name) if client.sandbox is not None else None
            assert found is not None
            assert labels(found)[LABEL_SESSION] == session_hash(session_id)
            grpc_address(client.target)
            told = json.dumps(found, ensure_ascii=False) + client.target + repr(client)
            assert len(session_id) < 16 or is_digest(session_id) or session_id not in told
        assert "\n" not in "".join(record.getMessage() for record in caplog.records)
        for session_id in ids:
            await manager.on_session_closed(session_id)
        assert api.objects == []


def is_digest(session_id: str) -> bool:
    return re.fullmatch(r"(sandbox-)?[0-9a-f]{32,40}", session_id) is not None


# Secrecy

ENCODED = [
    MARK,
    SESSION,
    repr(SESSION)[1:-1],
    MARK.encode().hex(),
    *(base64.b64encode(b"." * n + MARK.encode())[4:-4].decode() for n in range(3)),
]


def assert_untold(what: str, text: str) -> None:
    for form in ENCODED:
        assert form not in text, f"{what}: {text}"


@contextlib.contextmanager
def tasks_noted() -> Iterator[list[asyncio.Task[Any]]]:
    """All tasks that are made meanwhile."""
    noted: list[asyncio.Task[Any]] = []

    def make(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        noted.append(asyncio.Task(coroutine, loop=loop, **options))
        return noted[-1]

    loop = asyncio.get_running_loop()
    loop.set_task_factory(make)
    try:
        yield noted
    finally:
        loop.set_task_factory(None)


def texts(error: BaseException | None) -> Iterator[str]:
    """What an error says, and those that it came from."""
    while error is not None:
        yield from (str(error), repr(error), repr(error.args), repr(vars(error)))
        error = error.__cause__ or error.__context__


def assert_nothing_told(w: World, tasks: list[asyncio.Task[Any]], caplog: pytest.LogCaptureFixture) -> None:
    for request in w.api.requests:
        assert_untold("request", repr(request))
    for client in w.clients.made:
        assert_untold("client", f"{client.target} {client!r} {client.sandbox}")
    for record in caplog.records:
        assert_untold("log", f"{record.getMessage()} {record.__dict__}")
    assert caplog.records
    for task in tasks:
        assert_untold("task", task.get_name())
    for error in w.errors:
        for text in texts(error):
            assert_untold("error", text)


@pytest.mark.looptime
@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.happens.__name__)
async def test_no_failure_tells_the_session_id(failure: Failure, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    with tasks_noted() as tasks:
        async with world(**failure.settings) as w:
            await failure.happens(w)
            for sandbox in w.api.objects:
                assert_untold("Sandbox", json.dumps(sandbox, ensure_ascii=False))
            assert_untold("stats", repr(w.manager.stats()))
            w.api.allow("create", "delete", "patch", "watch")
    assert_nothing_told(w, tasks, caplog)
    count("failing paths searched for the session id")


@pytest.mark.looptime
async def test_a_life_without_failures_does_not_tell_it_either(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    with tasks_noted() as tasks:
        async with world(session_idle_timeout=60.0) as w:
            await w.manager.get_client(SESSION)
            await asyncio.sleep(180)
            await left_behind(w.api, SESSION)
            async with w.manager.session(SESSION):
                await asyncio.sleep(180)
            await w.manager.on_session_closed(SESSION)
            events = w.manager.stats().events
    assert {"sandbox_created", "sandbox_reaped", "sandbox_adopted", "sandbox_closed"} <= events.keys()
    assert_nothing_told(w, tasks, caplog)


@pytest.mark.looptime
async def test_refused_ids_are_not_repeated_either() -> None:
    async with world() as w:
        refused: Any
        for refused in ((SESSION,), [SESSION], SESSION.encode("utf-8", "surrogatepass"), {SESSION: 1}):
            for call in (w.manager.get_client, w.manager.on_session_initialized, w.manager.on_session_closed):
                await w.fails(call(refused), ValueError)
            with pytest.raises(ValueError, match="session_id is of type") as caught:
                w.manager.sandbox_name(refused)
            w.errors.append(caught.value)
        for error in w.errors:
            for text in texts(error):
                assert_untold("error", text)


# From one session to another


@pytest.mark.looptime
async def test_nothing_of_a_session_is_reached_by_another() -> None:
    """Whatever an id looks like, no other session's client, Sandbox or end comes of it."""
    async with world(max_sessions=50) as w:
        mine = await w.manager.get_client(SESSION)
        assert mine.sandbox is not None
        found = w.api.get(mine.sandbox.name)
        assert found is not None
        guesses = [
            mine.sandbox.name,
            mine.sandbox.uid,
            mine.target,
            labels(found)[LABEL_SESSION],
            f"{LABEL_SESSION}={labels(found)[LABEL_SESSION]}",
            SESSION + " ",
            SESSION[:-1],
            SESSION.strip(),
            SESSION.upper(),
            SESSION.encode("utf-8", "replace").decode(),
            SESSION.encode("utf-8", "backslashreplace").decode(),
            "*",
            "../",
            "\0",
        ]
        for guess in guesses:
            theirs = await w.manager.get_client(guess)
            assert theirs is not mine
            assert theirs.sandbox is not None
            assert (theirs.target, theirs.sandbox.uid) != (mine.target, mine.sandbox.uid)
            await w.manager.on_session_closed(guess)
        assert await w.manager.get_client(SESSION) is mine
        assert isinstance(mine, StubClient)
        assert not mine.closed
        assert alive(w.api) == [mine.sandbox.name]


@pytest.mark.looptime
async def test_a_sandbox_that_claims_to_be_a_sessions_but_is_not_is_never_handed_out() -> None:
    """Somebody who may write Sandboxes puts one under a session's name, with another's hash."""
    async with world() as w:
        body = await left_behind(w.api, OTHER)
        name = w.manager.sandbox_name(SESSION)
        planted = {**body, "metadata": {"name": name, "labels": body["metadata"]["labels"]}}
        planted.pop("status")
        at = ("agents.x-k8s.io", "v1beta1", "prodisco", "sandboxes")
        await w.api.create_namespaced_custom_object(*at, planted)
        w.api.set_ready(name)
        await w.fails(w.manager.get_client(SESSION), SandboxError)
        assert w.clients.made == []
        assert name in alive(w.api), "what is not this session's is left alone"


# What a pod may do


def test_the_pod_is_hardened() -> None:
    tls = TlsConfig(ca="/ca", cert="/crt", key="/key", server_name="sandbox", secret_name="keys")
    for version, config in itertools.product(
        ("v1alpha1", "v1beta1"), (CONFIG, SandboxManagerConfig(mode="multi", instance_id="me", tls=tls))
    ):
        body = SANDBOX.body(config, version, *checked("s"))
        pod = body["spec"]["podTemplate"]["spec"]
        [container] = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        assert container["resources"]["limits"].keys() == {"memory", "cpu", "ephemeral-storage"}
        # An account of its own: it has no rights unless somebody gives it some.
        assert pod["serviceAccountName"] == "sandbox-server"
        for dangerous in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace", "initContainers"):
            assert not pod.get(dangerous)
        assert all(not port.get("hostPort") for port in container["ports"])
        assert all(volume.keys() <= {"name", "emptyDir", "secret"} for volume in pod["volumes"])
        assert all(mount.get("readOnly") for mount in container["volumeMounts"] if mount["name"] == "tls")


@pytest.mark.looptime
async def test_the_managers_own_clients_speak_tls_or_nothing(tmp_path: Any) -> None:
    """The settings' TLS reaches every channel that the manager makes; there is no way around it."""
    tls = TlsConfig(ca=tmp_path / "missing", server_name="sandbox", secret_name="keys")
    config = SandboxManagerConfig(mode="multi", tls=tls, ready_timeout=5.0)
    async with (
        LoopTimeApi(auto_ready=True) as api,
        SandboxManager(config, custom_objects_api=api) as manager,
    ):
        with pytest.raises(SandboxError, match=r"TlsConfig\.ca: cannot read"):
            await manager.get_client("s")
        assert manager.stats().failed == 1
