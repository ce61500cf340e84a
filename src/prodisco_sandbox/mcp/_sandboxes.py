"""Finds the sandbox of a call, and what the call has to be told about it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
from mcp.server.mcpserver import Context

from .._log import get_logger
from ..client import SandboxClient
from ..errors import SandboxError
from ..manager import SandboxManager
from ..results import SandboxRef
from . import _texts as texts
from ._identity import Handles, Policy, connection_with_key
from ._language import Language

log = get_logger("mcp")

NEW = "new"
"""In place of a handle: the call gets a sandbox and a handle of its own, whatever its session is."""
REMEMBERED = 4096
"""Ended sessions that are remembered, to tell a return from a first use."""
CLEANUP_TIMEOUT = 5.0
"""Seconds that a cancelled call may take to clean up."""


class RefusedError(Exception):
    """The call gets no sandbox; the message is for the model."""


@dataclass(slots=True)
class Use:
    """One call's use of a sandbox."""

    client: SandboxClient
    handle: str | None
    """The handle with which the model comes back; None where its session identifies the sandbox."""
    note: str | None
    """A note for the model about the sandbox."""
    renew: Callable[[], Awaitable[None]]
    """Takes the session's new client, and the note about it, once the machine of this one was replaced."""
    shared: bool = False
    """Whether other processes serve the session, too."""
    delivered: bool = False
    """Whether handle and note are on their way to the model."""

    @property
    def news(self) -> str | None:
        """The note, once the call has been answered.

        Without it where a shared machine had been used before: the answer to its first call had the note.
        """
        return None if self.shared and self.client._found_unused is False else self.note


@dataclass(slots=True)
class _Memory:
    sandbox: SandboxRef | None
    note: str | None


async def _nothing_new() -> None:
    """A shared client has no machine of its own that could be replaced."""


class Sandboxes:
    """The sandboxes of a manager, by session or by handle.

    Args:
        manager: Makes and keeps them.
        session_key: The session of a request; None: it needs a handle.
        principal: The caller; None: unknown.
        max_per_principal: How many sandboxes a known principal may have.
        handles: Makes and reads handles.
        language: The language of the sandboxes, which decides whether they have files.
    """

    def __init__(
        self,
        manager: SandboxManager,
        *,
        session_key: Policy,
        principal: Policy,
        max_per_principal: int,
        handles: Handles,
        language: Language,
    ) -> None:
        self._manager = manager
        self._language = language
        self._session_key = session_key
        self.principal = principal
        self._max_per_principal = max_per_principal
        self._handles = handles
        self._has_one_sandbox = manager.config.mode == "single"
        self._memories: OrderedDict[str, _Memory] = OrderedDict()

    @property
    def is_ready(self) -> bool:
        """Whether the manager admits sessions."""
        return self._manager.is_ready

    @asynccontextmanager
    async def use(self, ctx: Context[Any, Any], handle: str | None, *, make: bool) -> AsyncIterator[Use]:
        """The sandbox of a call, which is not reaped meanwhile.

        Args:
            ctx: The call.
            handle: The handle that it gave.
            make: Whether a call that names no sandbox gets a new one.

        Raises:
            RefusedError: The call may not use that sandbox.
            SandboxError: No sandbox could be made.
        """
        if self._has_one_sandbox:
            async with self._manager.session() as client:
                yield Use(client, None, None, _nothing_new)
            return
        who = self.principal(ctx)
        key, handle, known = self._resolve(ctx, handle, who, make=make)
        owner = None if who is None else self._handles.owner(who)
        self._admit(key, owner)
        if handle is None:
            self._close_with_connection(ctx, key)
        unreachable = handle is not None and not known  # until the model has the handle
        try:
            async with self._manager.session(key, owner=owner) as client:
                memory = self._recall(key, client.sandbox, known=known)

                async def renew() -> None:
                    nonlocal memory
                    use.client = await self._manager.get_client(key, owner=owner)
                    memory = self._recall(key, use.client.sandbox, known=known)
                    use.note = memory.note

                use = Use(client, handle, memory.note, renew, shared=self._manager.config.shared)
                yield use
                if use.delivered:
                    memory.note, unreachable = None, False
        except SandboxError:  # No sandbox was made, or the manager is closing it already.
            unreachable = False
            raise
        finally:
            if unreachable:
                await self._abandon(key)

    async def close(self, ctx: Context[Any, Any], handle: str | None) -> str:
        """Ends the sandbox of a call, whether or not there is one; returns its name.

        Raises:
            RefusedError: The call names no sandbox, or may not close it.
        """
        if self._has_one_sandbox:
            raise RefusedError(texts.SHARED)
        key, _, _ = self._resolve(ctx, handle, self.principal(ctx), make=False)
        name = self._manager.sandbox_name(key)
        await self._manager.on_session_closed(key)
        return name

    def _resolve(
        self, ctx: Context[Any, Any], handle: str | None, who: str | None, *, make: bool
    ) -> tuple[str, str | None, bool]:
        """Session key, handle, and whether the caller came with that handle."""
        if handle is not None and handle.lower() != NEW:
            key = self._handles.read(handle, who)
            if key is None:
                raise RefusedError(texts.unknown_handle(self._language))
            return key, handle, True
        key = self._session_key(ctx) if handle is None else None
        if key is not None:
            return key, None, False
        if not make:
            raise RefusedError(texts.HANDLE_NEEDED)
        handle, key = self._handles.make(who)
        return key, handle, False

    def _admit(self, key: str, owner: str | None) -> None:
        """Refuses one sandbox too many; nothing is awaited before the manager counts this one."""
        if owner is None or self._manager.has_session(key):
            return
        is_full = self._manager.count_sessions(owner) >= self._max_per_principal
        if is_full and not self._manager.make_room(owner):
            idle = self._manager.config.session_idle_timeout
            raise RefusedError(texts.too_many(self._max_per_principal, idle))

    def _recall(self, key: str, sandbox: SandboxRef | None, *, known: bool) -> _Memory:
        memory = self._memories.get(key)
        if memory is None:
            # Only handles outlive the memory of their sessions.
            memory = self._memories[key] = _Memory(
                sandbox, texts.maybe_replaced(self._language) if known else None
            )
        elif memory.sandbox != sandbox:
            evicted = sandbox is not None and sandbox.after_eviction
            if not self._keeps_files(memory.sandbox, sandbox):
                memory.note = texts.replaced(self._language, evicted=evicted)
            elif memory.note is None:  # One that has yet to be delivered says more.
                memory.note = texts.restarted(self._language, evicted=evicted)
            memory.sandbox = sandbox
        self._memories.move_to_end(key)
        if len(self._memories) > REMEMBERED + self._manager.config.max_sessions:
            self._memories.popitem(last=False)
        return memory

    def _keeps_files(self, old: SandboxRef | None, new: SandboxRef | None) -> bool:
        """Whether the workspace of one machine is that of the other."""
        on_volume = self._manager.config.workspace_storage is not None
        return on_volume and old is not None and new is not None and old.uid == new.uid

    def _close_with_connection(self, ctx: Context[Any, Any], key: str) -> None:
        connection = connection_with_key(ctx, key)
        mark = f"prodisco_sandbox.closes.{id(self)}.{key}"
        if connection is not None and mark not in connection.state:
            connection.state[mark] = True
            connection.exit_stack.push_async_callback(self._connection_closed, key)

    async def _connection_closed(self, key: str) -> None:
        self._memories.pop(key, None)
        await self._manager.on_session_closed(key)

    async def _abandon(self, key: str) -> None:
        """Closes a sandbox whose handle was not delivered, so that nobody can come back to it."""
        self._memories.pop(key, None)
        # The manager goes on closing it after this timeout.
        with anyio.move_on_after(CLEANUP_TIMEOUT, shield=True):
            await self._manager.on_session_closed(key)
