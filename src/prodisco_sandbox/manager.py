"""The manager: for a session id, a live client of that session's own sandbox."""

from __future__ import annotations

import asyncio
import contextvars
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ._aio.tasks import outlast
from ._cluster.claim import resource_for
from .client import SandboxClient
from .config import SandboxManagerConfig
from .errors import SandboxError, SandboxManagerClosedError

if TYPE_CHECKING:
    from ._sessions.engine import Engine
    from ._sessions.table import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxManagerStats:
    """What a manager has at hand, and what it has done so far.

    Attributes:
        queued: Sessions that wait for a slot.
        creating: Sessions whose sandbox is being made.
        ready: Sessions with a sandbox.
        closing: Sessions whose Sandbox is not deleted yet; creating, ready and closing
            sessions are those that count against ``max_sessions``.
        waiting: Callers that wait for a session.
        created: Sandboxes made, re-creations included.
        recreated: Those made again after a reap, an eviction or a death, and pods replaced under a
            Sandbox.
        reaped: Sessions closed because nobody used them; their Sandboxes were deleted or suspended.
        evicted: With ``when_full="evict"``, sessions closed to make room for others.
        lost: Sessions whose sandbox died.
        failed: Creations that failed.
        delete_retries: Deletes that failed and were left to a retry.
        warm: With ``warm_pool``, sessions that got a sandbox which was running already.
        cold: With ``warm_pool``, sessions for which the pool had none.
        suspended: With ``on_idle="suspend"``, Sandboxes that were suspended.
        resumed: Suspended Sandboxes that were started again, whoever had suspended them.
        attached: With ``shared``, sessions that got a sandbox which had been made already.
        known: With ``shared``, sandboxes of the whole group at this moment.
        events: How often each event has been logged, or would have been at a lower level:
            ``{"sandbox_created": 7, "watch_broken": 1}``. Not part of a comparison.
    """

    queued: int = 0
    creating: int = 0
    ready: int = 0
    closing: int = 0
    waiting: int = 0
    created: int = 0
    recreated: int = 0
    reaped: int = 0
    evicted: int = 0
    lost: int = 0
    failed: int = 0
    delete_retries: int = 0
    warm: int = 0
    cold: int = 0
    suspended: int = 0
    resumed: int = 0
    attached: int = 0
    known: int = 0
    events: Mapping[str, int] = field(default_factory=dict, compare=False)


class SandboxManager:
    """Maps session ids to live clients of their sandboxes.

    ::

        config = SandboxManagerConfig(mode="multi", namespace="prodisco", max_sessions=50)
        async with SandboxManager(config) as manager:
            client = await manager.get_client(session_id)
            result = await client.execute("print(6 * 7)")

    A manager belongs to the event loop that it is first used in. The constructor starts
    nothing and needs no loop; ``async with``, `start` or the first awaited call starts
    the reaper. A manager that was shut down never opens again.

    Args:
        config: The settings.
        custom_objects_api: A kubernetes_asyncio ``CustomObjectsApi``, or a fake with its
            methods; at least create, get, list and delete. It is never closed here.
            None: connect as the environment says (in-cluster, else KUBECONFIG and
            K8S_CONTEXT), on first use.
        client_factory: Makes the client of a gRPC target; None: ``SandboxClient`` with
            the settings' TLS.
        wall_clock: The Unix time that leases are written in.

    Raises:
        TypeError: `config` is no `SandboxManagerConfig`, or `custom_objects_api` is that of
            the synchronous client.
    """

    def __init__(
        self,
        config: SandboxManagerConfig,
        *,
        custom_objects_api: Any | None = None,
        client_factory: Callable[[str], SandboxClient] | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        if not isinstance(config, SandboxManagerConfig):
            raise TypeError(f"config is {config!r}: it must be a SandboxManagerConfig")
        if type(custom_objects_api).__module__.split(".")[0] == "kubernetes":  # Its calls block the loop.
            raise TypeError(
                f"custom_objects_api is {custom_objects_api!r}: it must be that of kubernetes_asyncio"
            )
        self._config = config
        self._engine: Engine | None = None
        self._ready: dict[str, Session] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = os.getpid()
        self._shutdown: asyncio.Task[None] | None = None
        self._own_client: SandboxClient | None = None
        factory = client_factory or (lambda target: SandboxClient(target, tls=config.tls))
        if config.mode == "single" and config.single_target is not None:
            self._own_client = factory(config.single_target)
        if config.mode == "multi":
            # kubernetes_asyncio takes half a second to import: only who needs it pays,
            # and before there are sessions to keep waiting.
            from ._sessions.engine import Engine

            self._engine = Engine(config, custom_objects_api, factory, wall_clock)
            # With `shared` every use first sees to the deadline.
            self._ready = {} if config.shared else self._engine.table.ready

    @property
    def config(self) -> SandboxManagerConfig:
        """The settings that the manager was made with."""
        return self._config

    @property
    def is_ready(self) -> bool:
        """Whether sessions are admitted: it was started, is not shut down and, with ``shared``, knows
        the sessions of its group."""
        shared = None if self._engine is None else self._engine.shared
        return self._loop is not None and self._shutdown is None and (shared is None or shared.is_open)

    # Sessions

    def count_sessions(self, owner: str) -> int:
        """How many sandboxes the sessions of one owner have; with ``shared``, those of all managers.

        Args:
            owner: As it was given to `get_client` or `session`. With ``shared`` its hash is a label of the
                object, from its creation on.

        Raises:
            ValueError: The owner is None or empty.
        """
        owner = _checked(owner, "owner")
        return 0 if self._engine is None else self._engine.count_sessions(owner)

    def make_room(self, owner: str) -> bool:
        """Ends an idle session of an owner, as ``when_full="evict"`` does for another one of its own.

        For a cap of your own on the sessions of one owner: when it is reached, make room before you ask
        for the next. It waits for nothing.

        Args:
            owner: As it was given to `get_client` or `session`.

        Returns:
            False: there is none that nobody has used for ``evict_after``, or none may be ended.

        Raises:
            ValueError: The owner is None or empty.
        """
        owner = _checked(owner, "owner")
        usable = self._engine is not None and self._loop is not None and self._shutdown is None
        return usable and self._engine.parts.eviction.make_room_of(owner)  # type: ignore[union-attr]

    def has_session(self, session_id: str) -> bool:
        """Whether the session waits for a slot, is being created or is ready.

        True from the first call for the session until its sandbox is closed or found dead. With
        ``shared``, also where another manager of the group has made its sandbox. Single mode: False.

        Raises:
            ValueError: The id is None or empty.
        """
        session_id = _checked(session_id)
        return self._engine is not None and self._engine.has_session(session_id)

    async def get_client(self, session_id: str | None = None, *, owner: str | None = None) -> SandboxClient:
        """The client of a session's sandbox, made (or made again) if there is none.

        However many callers ask at once, one sandbox is created. It waits for a creation
        or a close under way, and for a slot as long as ``capacity_timeout`` allows.
        Using the client, and calling this, keeps the session from being reaped. The client
        is the manager's: do not close it.

        Safe to cancel: the creation goes on for whoever asks next.

        Args:
            session_id: Multi mode: any non-empty text. Single mode: not looked at.
            owner: Whose session it is: any non-empty text, equal for all sessions of one caller;
                None: not said. The first one that is given for a session stays.

        Raises:
            ValueError: The id is None or empty, or the owner is wrong, in multi mode.
            SandboxError: Single mode without a client; the session was closed meanwhile;
                or, as a subclass, what `SandboxError` lists.
        """
        try:
            session = self._ready.get(session_id)  # type: ignore[arg-type]
        except TypeError:  # Not hashable, so no id either; see below.
            session = None
        if session is not None:
            if owner is not None:
                session.owner = session.owner or _checked(owner, "owner")
            session.last_used = self._loop.time()  # type: ignore[union-attr]
            session.uses += 1
            return session.client  # type: ignore[return-value]
        engine = self._started()
        if engine is None:
            return self._single_client()
        owner = owner if owner is None else _checked(owner, "owner")
        session = await engine.acquire(_checked(session_id), owner=owner)
        return session.client  # type: ignore[return-value]

    def session(self, session_id: str | None = None, *, owner: str | None = None) -> SessionContext:
        """An async context manager around `get_client` that keeps the session busy.

        While it is entered, the session is not reaped. It may be entered by several tasks
        at once; each use needs its own call. Entering is safe to cancel, leaving does not
        wait.

        Args:
            session_id: As for `get_client`.
            owner: As for `get_client`.

        Raises:
            ValueError, SandboxError: On entering, as `get_client`.
        """
        return SessionContext(self, session_id, owner)

    async def on_session_initialized(
        self, session_id: str | None = None, *, owner: str | None = None
    ) -> None:
        """Makes the session's sandbox ready ahead of its first use.

        Returns at once if it already is, and joins a creation under way. Single mode:
        nothing. Idempotent; safe to cancel, as `get_client`.

        Args:
            session_id: As for `get_client`.
            owner: As for `get_client`.

        Raises:
            ValueError, SandboxError: As `get_client`.
        """
        engine = self._started()
        if engine is not None:
            owner = owner if owner is None else _checked(owner, "owner")
            await engine.acquire(_checked(session_id), owner=owner, use=False)

    async def on_session_closed(self, session_id: str | None = None) -> None:
        """Closes the session's client and deletes its Sandbox, also a suspended one, or one being created.

        Returns once it is deleted or handed to the background retry; with ``shared`` it is tried for some
        seconds only, and ends at its deadline after that. Never raises an error of the cluster. Callers
        that wait for the session get `SandboxError`. Idempotent, also after shutdown. Safe to cancel: the
        close goes on. Single mode: nothing.

        Raises:
            ValueError: The id is None or empty, in multi mode.
        """
        if self._engine is None:
            return
        session_id = _checked(session_id)
        if self._shutdown is None:
            self._started()
        elif self._loop is None:  # It was shut down before its first use.
            return
        await self._engine.close(session_id)

    def sandbox_name(self, session_id: str) -> str:
        """The name that the session's Sandbox has, or would have: for kubectl.

        Raises:
            ValueError: The id is None or empty.
        """
        session_id = _checked(session_id)
        if self._engine is None or self._loop is None:
            return resource_for(self._config).name(session_id, group=self._config.group)
        return self._engine.sandbox_name(session_id, self._loop.time())

    async def cleanup_orphaned_sandboxes(self, *, all_instances: bool = False) -> int:
        """Deletes Sandboxes that a previous incarnation of this manager left.

        These are the managed Sandboxes of the namespace that carry this instance_id and
        are in no session here, and those whose lease has lapsed. What sessions here have suspended
        stays. Called at start-up, it also deletes what a returning session could have adopted.
        Idempotent; safe to cancel: what is not deleted yet stays. Single mode: nothing.

        Args:
            all_instances: Delete every managed Sandbox that is in no session here, suspended ones
                and other managers' live ones included: only for a namespace that this manager has
                to itself.

        Returns:
            How many were deleted.

        Raises:
            SandboxUnavailableError: The cluster cannot be reached.
            SandboxPermissionError: Listing or deleting is not allowed.
        """
        engine = self._started()
        return 0 if engine is None else await engine.clean_up(all_instances=all_instances)

    def stats(self) -> SandboxManagerStats:
        """What is at hand at this moment, and totals so far."""
        if self._engine is None:
            return SandboxManagerStats()
        from ._sessions.table import SessionState

        table, events = self._engine.table, self._engine.parts.events
        counts = table.counts()
        return SandboxManagerStats(
            queued=counts[SessionState.QUEUED],
            creating=counts[SessionState.CREATING],
            ready=counts[SessionState.READY] + counts[SessionState.SUSPECT],
            closing=counts[SessionState.CLOSING],
            waiting=table.waiting(),
            created=events["sandbox_created"] + events["sandbox_recreated"],
            recreated=events["sandbox_recreated"] + events["sandbox_pod_replaced"],
            reaped=events["sandbox_reaped"],
            evicted=events["sandbox_evicted"],
            lost=events["sandbox_lost"] + events["sandbox_machine_lost"],
            failed=events["sandbox_failed"],
            delete_retries=events["sandbox_delete_failed"],
            warm=events["sandbox_started_warm"],
            cold=events["sandbox_started_cold"],
            suspended=events["sandbox_suspended"],
            resumed=events["sandbox_resumed"],
            attached=events["sandbox_attached"],
            known=0 if self._engine.shared is None else self._engine.shared.known,
            events=dict(events),
        )

    # Life

    async def start(self) -> None:
        """Starts the reaper. Idempotent; ``async with`` and the first awaited call do it too.

        Raises:
            SandboxManagerClosedError: The manager has been shut down.
        """
        self._started()

    async def shutdown(self) -> None:
        """Refuses new work, closes all clients, deletes every Sandbox, stops every task.

        With ``on_idle="suspend"`` and an ``instance_id`` that is set, Sandboxes in use are suspended
        instead, and suspended ones stay.

        Bounded by ``shutdown_timeout``; what it had to leave, or what may yet appear since
        the answer to its create was lost, it names in the log (``shutdown_incomplete``), and
        the cluster removes it when its lease ends. Single
        mode: leaves a ``single_client`` open, and closes the client that was made for a
        ``single_target``.

        Idempotent. Safe to cancel: the shutdown goes on in a task of the manager's.
        Leaving ``async with`` waits for it even if cancelled.
        """
        task = self._shut_down()
        if not task.done():  # else its loop, another one perhaps, may be closed by now
            await asyncio.wait({task})
        task.result()

    async def aclose(self) -> None:
        """The same as `shutdown`."""
        await self.shutdown()

    def _shut_down(self) -> asyncio.Task[None]:
        if self._loop is not None and (self._shutdown is None or not self._shutdown.done()):
            self._check_place()
        if self._shutdown is None:
            self._shutdown = asyncio.create_task(
                self._run_shutdown(), name="sandbox-shutdown", context=contextvars.Context()
            )
        return self._shutdown

    async def _run_shutdown(self) -> None:
        if self._engine is not None:
            if self._loop is not None:  # else nothing was ever started
                await self._engine.shutdown()
        elif self._own_client is not None:
            await self._own_client.close()

    async def __aenter__(self) -> Self:
        self._started()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await outlast(self._shut_down())  # bounded by shutdown_timeout

    def _started(self) -> Engine | None:
        if self._shutdown is not None:
            raise SandboxManagerClosedError("the manager has been shut down; make a new one")
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._pid = os.getpid()
            if self._engine is not None:
                self._engine.start()
        else:
            self._check_place()
        return self._engine

    def _check_place(self) -> None:
        if self._pid != os.getpid():
            raise SandboxError("the manager was used before this process was forked: make one per process")
        if self._loop is not asyncio.get_running_loop():
            raise SandboxError("the manager belongs to another event loop: make one per loop")

    def _single_client(self) -> SandboxClient:
        client = self._own_client or self._config.single_client
        if client is None:
            raise SandboxError(
                "single mode has no client: pass SandboxManagerConfig(single_client=...) or"
                " (single_target=...), or use SandboxManagerConfig.from_env()"
            )
        return client


class SessionContext:
    """What `SandboxManager.session` returns: enter it to get the session's client."""

    # A class with slots, since a contextlib generator costs four times as much per request.
    __slots__ = ("_manager", "_owner", "_session", "_session_id")

    def __init__(self, manager: SandboxManager, session_id: str | None, owner: str | None) -> None:
        self._manager = manager
        self._session_id = session_id
        self._owner = owner
        self._session: Session | None = None

    async def __aenter__(self) -> SandboxClient:
        manager = self._manager
        if self._session is not None:
            raise RuntimeError("a session() context is entered twice: call session() for each use")
        try:
            session = manager._ready.get(self._session_id)  # type: ignore[arg-type]
        except TypeError:
            session = None
        owner = self._owner
        if session is not None:
            if owner is not None:
                session.owner = session.owner or _checked(owner, "owner")
            session.holds += 1
            session.uses += 1
        else:
            engine = manager._started()
            if engine is None:
                return manager._single_client()
            owner = owner if owner is None else _checked(owner, "owner")
            session = await engine.acquire(_checked(self._session_id), owner=owner, hold=True)
        self._session = session
        return session.client  # type: ignore[return-value]

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.holds -= 1
            session.last_used = self._manager._loop.time()  # type: ignore[union-attr]


def _checked(value: object, name: str = "session_id") -> str:
    if not isinstance(value, str) or not value:
        # Not the value itself: an id is as good as a credential.
        got = "empty" if value == "" else f"of type {type(value).__name__}"
        raise ValueError(f"{name} is {got}: multi mode needs a non-empty str")
    return value
