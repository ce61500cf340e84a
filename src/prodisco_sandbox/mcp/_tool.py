"""The tool that runs code in a sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

import anyio
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp_types import CallToolResult, ToolAnnotations

from .._log import get_logger
from ..client import SandboxClient
from ..config import SandboxManagerConfig
from ..errors import SandboxError, SandboxReplacedError, SandboxTimeoutError
from ..manager import SandboxManager
from ..results import ExecutionState
from . import _parameters as p
from . import _texts as texts
from ._audit import CallRecord, audited
from ._environment import Environment
from ._files import LINKS_SINCE, add_file_tools, name_files
from ._identity import Handles, Policy
from ._identity import principal as default_principal
from ._identity import session_key as default_session_key
from ._language import Language, language_of
from ._output import Clip, SandboxOutput, read_executions, read_report, result_of
from ._progress import Progress
from ._reading import (
    PARAMETERS,
    Call,
    WrongCallError,
    foreign_arguments,
    object_arguments,
    read_call,
)
from ._resuming import ends_with_connection
from ._sandboxes import CLEANUP_TIMEOUT, RefusedError, Sandboxes, Use

log = get_logger("mcp")

T = TypeVar("T")
Work = Callable[[Use, Progress], Awaitable[CallToolResult]]

FINAL = frozenset(state.name for state in ExecutionState if state.is_final)
NEED_NO_SANDBOX = ("execute", "stream", "async", "test")
"""Modes that get a new sandbox where none is named; the others ask about executions in one."""


def add_sandbox_tools(
    server: MCPServer[Any],
    manager: SandboxManager,
    *,
    name: str = "run_sandbox",
    language: str = "Python",
    session_key: Policy = default_session_key,
    principal: Policy = default_principal,
    max_per_principal: int | None = None,
    max_output: int = 30_000,
    handle_secret: str | bytes | None = None,
    sandbox_header: bool = False,
    file_tools: bool = True,
    resource_links: bool = False,
    learn_environment: bool = False,
) -> SandboxTools:
    """Adds the tool that runs code in sandboxes to a server.

    Args:
        server: The server.
        manager: Where the sandboxes come from. `sandbox_lifespan` ties its life to the
            server's.
        name: The tool's name.
        language: The language of the sandboxes. The tool's description is that of the reference
            server for Python, and of the stock Node server for TypeScript and JavaScript.
        session_key: The session of a request, None where it has none: then the model is
            given a handle. The result is the manager's session id, unchanged, so
            ``manager.get_client(session_key(ctx))`` in a tool of your own is the same
            sandbox. Sessions of the default policy end with their connection; those of
            another, when the manager reaps them.
        principal: The caller, None if unknown. Handles are bound to it.
        max_per_principal: How many sandboxes a known principal may have at a time; None:
            half of ``max_sessions``, at least one. Callers without authentication cannot
            be told apart, and are not limited.
        max_output: How many characters of an output one result holds.
        handle_secret: At least 16 random characters, for handles that are to outlive the
            process or to be valid in others; None: random.
        sandbox_header: Clients of protocol 2026-07-28 send the handle as the header
            ``Mcp-Param-Sandbox`` too, for gateways that route by it. It is a bearer secret:
            such gateways must not log it.
        file_tools: Also add read_file, write_file and list_files, and resources with the files that
            runs make, unless sandboxes of the language have no files.
        resource_links: Results of runs also hold links to the resources, for clients that show them. Some
            clients, such as langchain-mcp-adapters, pass links to the model's provider, which refuses them.
        learn_environment: The first call runs a few more lines of Python in its sandbox, to tell the
            model which Python and packages there are: in a note, and in the tool's description from
            then on.

    Returns:
        The tools, for a graceful shutdown.

    Raises:
        ValueError: An argument is wrong; the message names it.
    """
    if max_per_principal is None:
        max_per_principal = max(1, manager.config.max_sessions // 2)
    for argument, value in (("max_per_principal", max_per_principal), ("max_output", max_output)):
        if not isinstance(value, int) or value < 1:  # type: ignore[redundant-expr]
            raise ValueError(f"{argument} is {value!r}: it must be an integer of at least 1")
    if session_key is default_session_key:
        session_key = functools.partial(default_session_key, principal=principal)
    spoken = language_of(language)
    sandboxes = Sandboxes(
        manager,
        session_key=session_key,
        principal=principal,
        max_per_principal=max_per_principal,
        handles=Handles(handle_secret),
        language=spoken,
    )
    tools = SandboxTools(sandboxes, name, spoken, max_output, resource_links=resource_links)
    server.middleware.append(object_arguments(name))
    server.add_tool(
        tools.run_sandbox,
        name=name,
        title="Run code in a sandbox",
        description=_description(spoken, manager.config),
        annotations=ToolAnnotations(
            read_only_hint=False, destructive_hint=True, idempotent_hint=False, open_world_hint=True
        ),
        structured_output=True,
    )
    names = [name]
    if file_tools and spoken.has_files:
        names += add_file_tools(server, tools)
    # The SDK takes schema and description once, which here depend on an argument and on what is learnt.
    added = [tool for each in names if (tool := server._tool_manager.get_tool(each)) is not None]
    if learn_environment:
        tools.environment = Environment(
            lambda text: setattr(added[0], "description", f"{added[0].description}\n\n{text}")
        )
    for tool in added if sandbox_header else ():
        tool.parameters["properties"]["sandbox"]["x-mcp-header"] = "Sandbox"
    return tools


def _description(language: Language, config: SandboxManagerConfig) -> str:
    keeps_files = config.on_idle == "suspend" and config.workspace_storage is not None
    kept_for = config.suspended_for if keeps_files else None
    evict_after = config.evict_after if config.when_full == "evict" else None
    return texts.description(language, config.session_idle_timeout, kept_for, evict_after)


class SandboxTools:
    """The tool that `add_sandbox_tools` has added."""

    def __init__(
        self,
        sandboxes: Sandboxes,
        name: str,
        language: Language,
        max_output: int,
        *,
        resource_links: bool,
    ) -> None:
        self.environment: Environment | None = None
        self._sandboxes = sandboxes
        self._name = name
        self.language = language
        self.max_output = max_output
        self._resource_links = resource_links
        self._calls = 0
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._draining = False

    @property
    def draining(self) -> bool:
        """Whether `drain` has been called."""
        return self._draining

    @property
    def is_ready(self) -> bool:
        """Whether calls are taken: not before the manager is ready, and not after `drain`."""
        return not self._draining and self._sandboxes.is_ready

    async def drain(self, timeout: float) -> bool:
        """Refuses new calls from now on, and waits for those that are under way.

        Idempotent; safe to cancel: calls stay refused.

        Args:
            timeout: How long to wait, in seconds.

        Returns:
            Whether all of them have ended.
        """
        self._draining = True
        try:
            async with asyncio.timeout(timeout):
                await self._quiet.wait()
        except TimeoutError:
            log.warning("drain_incomplete", calls=self._calls, timeout=timeout)
            return False
        return True

    async def run_sandbox(
        self,
        ctx: Context[Any, Any],
        mode: p.ModeParameter = p.ABSENT,
        code: p.Code = p.ABSENT,
        cached: p.Cached = p.ABSENT,
        timeout_ms: p.TimeoutMs = p.ABSENT,
        execution_id: p.ExecutionId = p.ABSENT,
        wait: p.Wait = p.ABSENT,
        output_offset: p.OutputOffset = p.ABSENT,
        error_output_offset: p.ErrorOutputOffset = p.ABSENT,
        states: p.States = p.ABSENT,
        limit: p.Limit = p.ABSENT,
        include_completed_within_ms: p.Within = p.ABSENT,
        tests: p.Tests = p.ABSENT,
        sandbox: p.Sandbox = p.ABSENT,
    ) -> Annotated[CallToolResult, SandboxOutput]:
        """The tool itself; its description is in _texts.py."""
        values = (
            mode, code, cached, timeout_ms, execution_id, wait, output_offset, error_output_offset,
            states, limit, include_completed_within_ms, tests, sandbox,
        )  # fmt: skip
        sent = foreign_arguments(ctx, self._name) | dict(zip(PARAMETERS, values, strict=True))
        try:
            call = read_call(sent, self.language)
        except WrongCallError as error:
            return self.invalid(ctx, str(error))

        async def work(use: Use, progress: Progress) -> CallToolResult:
            return await self._in_sandbox(ctx, use, call, progress)

        return await self.answer(ctx, call.mode, call.sandbox, work, make=call.mode in NEED_NO_SANDBOX)

    def invalid(self, ctx: Context[Any, Any], problem: str) -> CallToolResult:
        """Answers a call whose arguments cannot be read."""
        with audited(self._sandboxes.principal(ctx)) as record:
            record.outcome = "invalid"
            return result_of(SandboxOutput(), problem)

    async def answer(
        self, ctx: Context[Any, Any], mode: str, sandbox: str | None, work: Work, *, make: bool
    ) -> CallToolResult:
        """Carries out a call, unless it is refused, and logs it.

        Args:
            ctx: The call.
            mode: What it does, for the log.
            sandbox: The handle that it gave.
            work: What to do in its sandbox.
            make: Whether it gets a new sandbox where it names none.
        """
        with audited(self._sandboxes.principal(ctx)) as record:
            record.mode = mode
            if self._draining:
                record.outcome = "refused"
                return result_of(SandboxOutput(), texts.DRAINING)
            self._calls += 1
            self._quiet.clear()
            try:
                result = result_of(SandboxOutput(), texts.DROPPED)
                async with ends_with_connection(ctx.request_context.request, ctx.request_id):
                    result = await self._answer(ctx, sandbox, work, record, make=make)
                return result  # noqa: RET504 - the block may have been left without
            finally:
                self._calls -= 1
                if not self._calls:
                    self._quiet.set()

    async def _answer(
        self, ctx: Context[Any, Any], sandbox: str | None, work: Work, record: CallRecord, *, make: bool
    ) -> CallToolResult:
        try:
            if record.mode == "close":
                record.sandbox = await self._sandboxes.close(ctx, sandbox)
                record.outcome = "ok"
                return result_of(SandboxOutput(success=True, note=texts.closed(self.language)))
            async with Progress(ctx) as progress, self._sandboxes.use(ctx, sandbox, make=make) as use:
                progress.doing = "running"
                record.use = use
                result = await work(use, progress)
                failed = (result.structured_content or {}).get("success") is False
                record.outcome = "error" if result.is_error else "failed" if failed else "ok"
                # Before the handle counts as delivered: the caller may leave meanwhile.
                await progress.flush()
                use.delivered = True
                return result
        except RefusedError as refusal:
            record.outcome = "refused" if refusal.__cause__ is None else "no_sandbox"
            return result_of(SandboxOutput(), str(refusal))
        except SandboxError as error:
            record.outcome = "no_sandbox"
            log.warning("no_sandbox", error=str(error))
            return result_of(SandboxOutput(), texts.no_sandbox(error))

    async def _in_sandbox(
        self, ctx: Context[Any, Any], use: Use, call: Call, progress: Progress
    ) -> CallToolResult:
        problem = None
        try:
            output = await self.repeated(
                use, call.mode, lambda client: self._carry_out(client, call, progress)
            )
            if output.state in FINAL and call.mode in ("execute", "stream", "status"):
                links = self._resource_links and ctx.request_context.protocol_version >= LINKS_SINCE
                await name_files(use.client, output, use.handle, links=links)
            if self.environment is not None and call.mode in NEED_NO_SANDBOX:
                learnt = await self.environment.learn(use.client)
                if learnt is not None:
                    output.add_note(learnt)
            if output.state == ExecutionState.TIMEOUT.name and call.mode in ("execute", "stream"):
                problem = texts.timed_out(call.limit_ms, p.MAX_TIMEOUT_MS, self.language)
        except ValueError as error:  # A wrong argument; the message names it.
            output, problem = SandboxOutput(), str(error)
        except SandboxError as error:
            log.warning("call_failed", mode=call.mode, error=str(error))
            output, problem = SandboxOutput(), texts.failed_call(error, call.mode, self.language)
        output.sandbox = use.handle
        for note in (use.news, *call.notes):
            if note is not None:
                output.add_note(note)
        return result_of(output, problem)

    async def repeated(self, use: Use, mode: str, work: Callable[[SandboxClient], Awaitable[T]]) -> T:
        """Does the work; repeats what was refused because its machine was replaced."""
        try:
            return await work(use.client)
        except SandboxReplacedError as error:
            if error.ran:
                raise
            log.warning("call_repeated", mode=mode, error=str(error))
        try:
            await use.renew()
        except SandboxError as error:
            log.warning("no_sandbox", error=str(error))
            raise RefusedError(texts.no_sandbox(error)) from error
        return await work(use.client)

    async def _carry_out(self, client: SandboxClient, call: Call, progress: Progress) -> SandboxOutput:
        match call.mode:
            case "execute" | "stream":
                return await self._run(client, call, progress)
            case "async":
                started = await client.execute_async(code=call.code, cached=call.cached, timeout=call.timeout)
                return SandboxOutput(execution_id=started.execution_id, state=started.state.name)
            case "status":
                return await self._status(client, call)
            case "cancel":
                cancelled = await client.cancel_execution(call.execution_id)
                return SandboxOutput(
                    success=cancelled.success,
                    state=cancelled.state.name,
                    execution_id=call.execution_id,
                    error=cancelled.message,
                )
            case "list":
                # Without a limit: a server may keep the oldest ones instead of the newest.
                found = await client.list_executions(
                    states=[ExecutionState[name] for name in call.states],
                    include_completed_within=call.include_completed_within_ms / 1000,
                )
                return SandboxOutput(executions=read_executions(found, call.limit))
            case _:
                report = await client.execute_test(tests=call.tests, code=call.code, timeout=call.timeout)
                return read_report(report, self.max_output, texts.less(self.language))

    async def _run(self, client: SandboxClient, call: Call, progress: Progress) -> SandboxOutput:
        merged = call.mode == "execute"
        output = Clip(self.max_output)
        errors = output if merged else Clip(self.max_output)
        offset = error_offset = 0
        result, execution_id = SandboxOutput(), ""
        try:
            async with client.execute_stream(
                code=call.code, cached=call.cached, timeout=call.timeout
            ) as stream:
                async for chunk in stream:
                    execution_id = chunk.execution_id
                    if chunk.result is not None:
                        result.end(chunk.result)
                    elif chunk.kind == "output":
                        offset += output.add(chunk.text)
                    else:
                        error_offset += errors.add(chunk.text)
                    progress.feed(chunk.text)
        except asyncio.CancelledError:
            # Not every server stops the code when its caller leaves.
            await _cancel(client, execution_id)
            raise
        result.execution_id = execution_id or None
        result.output = output.text
        if not merged:
            result.error_output = errors.text
        clipped = output if output.left_out else errors
        if clipped.left_out:
            result.truncated = True
            result.output_offset, result.error_output_offset = offset, error_offset
            result.note = texts.rest(clipped.left_out, execution_id, offset, error_offset, self.language)
        return result

    async def _status(self, client: SandboxClient, call: Call) -> SandboxOutput:
        if call.wait:
            with contextlib.suppress(SandboxTimeoutError):
                await client.wait_for_execution(call.execution_id, timeout=call.patience)
        # From the beginning: servers count offsets in different units.
        status = await client.get_execution(call.execution_id)
        result = SandboxOutput(execution_id=status.execution_id, state=status.state.name)
        if status.result is not None:
            result.end(status.result)
        begin, error_begin = call.output_offset, call.error_output_offset
        result.output = status.output[begin : begin + self.max_output]
        result.error_output = status.error_output[error_begin : error_begin + self.max_output]
        result.output_offset = begin + len(result.output)
        result.error_output_offset = error_begin + len(result.error_output)
        left = max(
            len(status.output) - result.output_offset, len(status.error_output) - result.error_output_offset
        )
        if left > 0:
            result.truncated = True
            result.note = texts.rest(
                left,
                call.execution_id,
                result.output_offset,
                result.error_output_offset,
                self.language,
            )
        elif status.state.is_final and (begin or error_begin) and not (status.output or status.error_output):
            result.note = texts.lost(self.language)
        elif begin > len(status.output) or error_begin > len(status.error_output):
            result.note = texts.beyond(begin, len(status.output), error_begin, len(status.error_output))
        return result


async def _cancel(client: SandboxClient, execution_id: str) -> None:
    """Stops an execution whose caller has left."""
    if not execution_id:
        return
    with anyio.move_on_after(CLEANUP_TIMEOUT, shield=True):
        try:
            await client.cancel_execution(execution_id)
        except SandboxError as error:
            # It may have ended by itself, or the whole sandbox.
            log.info("cancel_failed", execution=execution_id, error=str(error))
