"""ExecuteAsync, GetExecution, CancelExecution, ListExecutions: queued, running, finished."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from prodisco_sandbox.proto import sandbox_pb2 as pb
from prodisco_sandbox.server._executions import Execution
from tests.support.patience import PATIENCE, until
from tests.support.servers import Server, Stub, alive, code, resident, running

SLEEP = "import time; time.sleep(1000)"


def get(execution_id: str, **more: object) -> pb.GetExecutionRequest:
    return pb.GetExecutionRequest(execution_id=execution_id, **more)  # type: ignore[arg-type]


async def test_async_returns_at_once_and_wait_waits(stub: Stub) -> None:
    source = "import time, sys; print('é'); print('e', file=sys.stderr); time.sleep(0.2); print('b')"
    started = await stub.ExecuteAsync(code(source))
    assert started.state == pb.EXECUTION_STATE_RUNNING
    answer = await stub.GetExecution(get(started.execution_id, wait=True))
    assert (answer.output, answer.error_output) == ("é\nb\n", "e\n")
    assert (answer.output_length, answer.error_output_length) == (4, 2)
    assert answer.state == answer.result.state == pb.EXECUTION_STATE_COMPLETED
    assert answer.result.success
    assert answer.result.execution_time_ms >= 200
    rest = await stub.GetExecution(get(started.execution_id, output_offset=2))
    assert (rest.output, rest.error_output, rest.output_length) == ("b\n", "", 4)


async def test_get_while_it_runs(stub: Stub) -> None:
    started = await stub.ExecuteAsync(code(f"print('x'); {SLEEP}"))
    async with asyncio.timeout(PATIENCE):
        while not (answer := await stub.GetExecution(get(started.execution_id))).output:
            await asyncio.sleep(0.01)
    assert answer.state == pb.EXECUTION_STATE_RUNNING
    assert not answer.HasField("result")
    await stub.CancelExecution(pb.CancelExecutionRequest(execution_id=started.execution_id))


async def test_leaving_a_get_that_waits_leaves_the_execution(stub: Stub) -> None:
    started = await stub.ExecuteAsync(code(SLEEP))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetExecution(get(started.execution_id, wait=True), timeout=0.1)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert (await stub.GetExecution(get(started.execution_id))).state == pb.EXECUTION_STATE_RUNNING
    await stub.CancelExecution(pb.CancelExecutionRequest(execution_id=started.execution_id))


async def test_cancel_answers_when_all_is_gone(stub: Stub) -> None:
    started = await stub.ExecuteAsync(
        code(f"import os; print(os.getpid()); os.fork(); print(os.getpid()); {SLEEP}")
    )
    output = ""
    async with asyncio.timeout(PATIENCE):
        while output.count("\n") < 3:
            output = (await stub.GetExecution(get(started.execution_id))).output
    request = pb.CancelExecutionRequest(execution_id=started.execution_id)
    answer = await stub.CancelExecution(request)
    assert (answer.success, answer.state) == (True, pb.EXECUTION_STATE_CANCELLED)
    assert not any(alive(int(pid)) for pid in output.split())
    assert (await stub.GetExecution(get(started.execution_id))).result.error == "cancelled"
    again = await stub.CancelExecution(request)
    assert (again.success, again.state) == (True, pb.EXECUTION_STATE_CANCELLED)


async def test_cancel_comes_too_late(stub: Stub) -> None:
    started = await stub.ExecuteAsync(code("pass"))
    await stub.GetExecution(get(started.execution_id, wait=True))
    answer = await stub.CancelExecution(pb.CancelExecutionRequest(execution_id=started.execution_id))
    assert (answer.success, answer.state) == (False, pb.EXECUTION_STATE_COMPLETED)
    assert "COMPLETED" in answer.message


async def test_a_failure_has_its_result(stub: Stub) -> None:
    started = await stub.ExecuteAsync(code("1/0"))
    result = (await stub.GetExecution(get(started.execution_id, wait=True))).result
    assert (result.success, result.state) == (False, pb.EXECUTION_STATE_FAILED)
    assert result.error == "ZeroDivisionError: division by zero"


async def test_unknown_ids_are_not_found(stub: Stub) -> None:
    for call in (
        stub.GetExecution(get("nobody")),
        stub.CancelExecution(pb.CancelExecutionRequest(execution_id="")),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_a_negative_offset_is_refused(stub: Stub) -> None:
    started = await stub.ExecuteAsync(code("pass"))
    with pytest.raises(grpc.aio.AioRpcError, match="output_offset is -1") as caught:
        await stub.GetExecution(get(started.execution_id, output_offset=-1))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_list_is_newest_first_and_filters(stub: Stub) -> None:
    ids = []
    for number in range(3):
        started = await stub.ExecuteAsync(code(f"# {number}\n" + "x = 1\n" * 40))
        await stub.GetExecution(get(started.execution_id, wait=True))
        ids.append(started.execution_id)
    failed = await stub.ExecuteAsync(code("1/0"))
    await stub.GetExecution(get(failed.execution_id, wait=True))

    newest = (await stub.ListExecutions(pb.ListExecutionsRequest(limit=4))).executions
    assert [e.execution_id for e in newest] == [failed.execution_id, *reversed(ids)]
    assert newest[1].code_preview == ("# 2\n" + "x = 1\n" * 40)[:100]
    assert newest[1].started_at_ms <= newest[1].finished_at_ms
    assert not newest[1].is_cached
    completed = pb.ListExecutionsRequest(states=[pb.EXECUTION_STATE_COMPLETED], limit=2)
    assert [e.execution_id for e in (await stub.ListExecutions(completed)).executions] == ids[:0:-1]
    await asyncio.sleep(0.05)
    recent = pb.ListExecutionsRequest(include_completed_within_ms=40)
    assert not (await stub.ListExecutions(recent)).executions


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    limits = ("--max-concurrent", "1", "--max-queued", "2")
    with running(tmp_path_factory.mktemp("small"), *limits) as server:
        yield server


async def test_queue_is_bounded_and_in_order(small: Server) -> None:
    async with small.connect() as stub:
        first = await stub.ExecuteAsync(code(SLEEP))
        append = "open('order', 'a').write('{}'); print(open('order').read())"
        second = await stub.ExecuteAsync(code(append.format("second ")))
        third = await stub.ExecuteAsync(code(append.format("third")))
        assert second.state == third.state == pb.EXECUTION_STATE_PENDING
        with pytest.raises(grpc.aio.AioRpcError, match="--max-queued") as caught:
            await stub.Execute(code("print('fourth')"))
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        waiting = asyncio.ensure_future(stub.GetExecution(get(third.execution_id, wait=True)))
        await stub.CancelExecution(pb.CancelExecutionRequest(execution_id=first.execution_id))
        assert (await waiting).output == "second third\n"


async def test_a_queued_execution_is_cancelled_without_having_run(small: Server) -> None:
    async with small.connect() as stub:
        first = await stub.ExecuteAsync(code(SLEEP))
        queued = stub.Execute(code("open('ran', 'w')"))

        async def states() -> list[int]:
            answer = await stub.ListExecutions(pb.ListExecutionsRequest())
            found: list[int] = [e.state for e in answer.executions if e.code_preview == "open('ran', 'w')"]
            return found[:1]

        async def is_pending() -> bool:
            return await states() == [pb.EXECUTION_STATE_PENDING]

        async def is_cancelled() -> bool:
            return await states() == [pb.EXECUTION_STATE_CANCELLED]

        await until(is_pending)
        queued.cancel()
        await until(is_cancelled)
        await stub.CancelExecution(pb.CancelExecutionRequest(execution_id=first.execution_id))
        assert (await stub.Execute(code("import os; print(os.path.exists('ran'))"))).output == "False\n"


async def test_finished_executions_are_forgotten_by_age(tmp_path: Path) -> None:
    with running(tmp_path, "--retain-for", "0.2") as server:
        async with server.connect() as stub:
            # Nobody asks for it until it is over: it may be forgotten before the question comes.
            started = await stub.ExecuteAsync(code("pass"))
            async with asyncio.timeout(PATIENCE):
                while (await stub.ListExecutions(pb.ListExecutionsRequest())).executions:
                    await asyncio.sleep(0.02)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GetExecution(get(started.execution_id))
            assert caught.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.slow
async def test_finished_executions_are_forgotten_by_size(tmp_path: Path) -> None:
    with running(tmp_path, "--retain-limit-mb", "1") as server:
        async with server.connect() as stub:
            ids = []
            for _ in range(4):
                started = await stub.ExecuteAsync(code("print('x' * 400_000)"))
                await stub.GetExecution(get(started.execution_id, wait=True))
                ids.append(started.execution_id)
            kept = (await stub.ListExecutions(pb.ListExecutionsRequest())).executions
            assert [e.execution_id for e in kept] == [ids[3], ids[2]]


async def test_everything_but_language_servers_is_there(stub: Stub) -> None:
    for call in (
        stub.LspWorkspaceSymbol(pb.LspWorkspaceSymbolRequest(query="x")),
        stub.LspHover(pb.LspPositionRequest()),
        stub.LspGoToDefinition(pb.LspPositionRequest()),
        stub.LspFindReferences(pb.LspReferencesRequest()),
        stub.LspDocumentSymbol(pb.LspDocumentRequest()),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match="no language server") as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.slow
async def test_an_interpreter_that_cannot_be_started_is_an_answer(tmp_path: Path) -> None:
    few = ("/bin/sh", "-c", 'ulimit -n 40; exec "$0" "$@"', sys.executable, "-m", "prodisco_sandbox.server")
    with running(tmp_path, "--max-concurrent", "50", "--spare-interpreters", "0", command=few) as server:
        async with server.connect() as stub:
            ids = [(await stub.ExecuteAsync(code(SLEEP))).execution_id for _ in range(16)]
            answers = [await stub.GetExecution(get(execution_id)) for execution_id in ids]
            assert answers[0].state == pb.EXECUTION_STATE_RUNNING
            assert answers[-1].state == pb.EXECUTION_STATE_FAILED
            assert "cannot start an interpreter" in answers[-1].result.error
            for execution_id in ids:
                await stub.CancelExecution(pb.CancelExecutionRequest(execution_id=execution_id))
            assert (await stub.Execute(code("print(1)"))).output == "1\n"


async def test_long_error_texts_are_cut(stub: Stub) -> None:
    answer = await stub.Execute(code("raise ValueError('x' * 5_000_000)"))
    assert answer.error.startswith("ValueError: xxx")
    assert answer.error.endswith("characters]")
    assert len(answer.error) < 70_000


@pytest.mark.parametrize("length", [20_000, 1_000_000])
async def test_long_ids_and_names_have_their_codes(stub: Stub, length: int) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetExecution(pb.GetExecutionRequest(execution_id="x" * length))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ExecuteAsync(pb.ExecuteRequest(cached="x" * length))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_all_that_an_execution_holds_counts() -> None:
    held = Execution("s" * 1000, 1, 10_000, tests="t" * 2000)
    held.report, held.error = "r" * 3000, "e" * 4000
    held.output.feed("\N{OWL}".encode() * 1000)
    held.error_output.feed(b"x" * 1000)
    assert 15_000 < held.size < 18_000, "an owl takes four bytes"


@pytest.mark.slow
async def test_reports_do_not_fill_the_memory(tmp_path: Path) -> None:
    with running(tmp_path, "--retain-limit-mb", "8", "--cache-limit-mb", "0") as server:
        async with server.connect() as stub:
            await stub.Execute(code("print(1)"))
            before = resident(server.pid)
            for _ in range(40):
                await stub.Execute(code("import os; os.write(3, b'x' * (4 << 20))"))
                await stub.ExecuteTest(pb.ExecuteTestRequest(code="1/0", tests="#" * (8 << 20)))
            assert resident(server.pid) - before < 200 << 20


# The workspace's limit


@pytest.mark.slow
async def test_what_is_over_its_limit_may_make_room(tmp_path: Path) -> None:
    with running(tmp_path, "--workspace-limit-mb", "10") as server:
        async with server.connect() as stub:
            await stub.Execute(code("for n in range(4): open(f'f{n}', 'wb').write(bytes(10 << 20))"))
            await until(lambda: "more than 10 MiB in the workspace" in server.log())
            # Longer than it takes until the next look.
            answer = await stub.Execute(code("import time; time.sleep(1.5); print('ok')"))
            assert answer.output == "ok\n", answer.error
    assert "never retrieved" not in server.log()


@pytest.mark.slow
async def test_what_is_quicker_than_the_watch_is_stopped_too(tmp_path: Path) -> None:
    with running(tmp_path, "--workspace-limit-mb", "10") as server:
        async with server.connect() as stub:
            answers = []
            for n in range(15):
                source = f"for n in range(4): open(f'f{n}-{{n}}', 'wb').write(bytes(2 << 20))"
                answers.append(await stub.Execute(code(source)))
                await asyncio.sleep(0.3)
    refused = [answer.error for answer in answers if not answer.success]
    assert refused
    assert "remove files first" in refused[-1]
