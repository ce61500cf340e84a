"""Execute and ExecuteStream, on a real server."""

from __future__ import annotations

import asyncio
import os
import time

import grpc
import pytest

from prodisco_sandbox.proto import sandbox_pb2 as pb
from tests.support.patience import PATIENCE, until
from tests.support.servers import Server, Stub, alive, code


async def test_output_and_success(stub: Stub) -> None:
    answer = await stub.Execute(code("print(6 * 7)"))
    assert answer.success
    assert answer.output == "42\n"
    assert not answer.HasField("error")
    assert answer.execution_time_ms >= 0


async def test_empty_code_is_valid_and_not_cached(stub: Stub) -> None:
    answer = await stub.Execute(code(""))
    assert answer.success
    assert not answer.HasField("cached")


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("1/0", "ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("import sys; sys.exit('no')", "SystemExit: no"),
        ("import os; os._exit(7)", "exit status 7"),
        ("import os; os.kill(os.getpid(), 11)", "killed by signal 11 (SIGSEGV)"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("input()", "EOFError: EOF when reading a line"),
        ("x = '\0'", "null bytes"),
    ],
)
async def test_failure_is_no_rpc_error(stub: Stub, source: str, error: str) -> None:
    answer = await stub.Execute(code(source))
    assert not answer.success
    assert error in answer.error
    assert not answer.HasField("cached")


async def test_traceback_shows_the_line_and_none_of_the_server(stub: Stub) -> None:
    answer = await stub.Execute(code("def f():\n    return 1 / 0  # here\nf()\n"))
    assert "return 1 / 0  # here" in answer.output
    assert "_supervisor" not in answer.output


async def test_source_lines_are_there_for_logging_and_inspect(stub: Stub) -> None:
    source = "import inspect\ndef f():\n    return 41  # mine\nprint(inspect.getsource(f))"
    assert "return 41  # mine" in (await stub.Execute(code(source))).output


async def test_is_main_and_runs_exit_handlers_and_threads(stub: Stub) -> None:
    source = """
import atexit, threading, time
atexit.register(print, "exit handler")
go_on = threading.Event()
threading.Thread(target=lambda: (go_on.wait(), time.sleep(0.05), print("thread"))).start()
if __name__ == "__main__":
    print("main")
go_on.set()
"""
    assert (await stub.Execute(code(source))).output == "main\nthread\nexit handler\n"


async def test_outputs_are_merged_in_order(stub: Stub) -> None:
    source = "import sys\nfor i in range(50):\n    print(i, file=(sys.stdout, sys.stderr)[i % 2])"
    assert (await stub.Execute(code(source))).output.split() == [str(i) for i in range(50)]


async def test_a_file_is_there_for_the_next_execution_and_importable(stub: Stub) -> None:
    assert (await stub.Execute(code("open('mine.py', 'w').write('x = 5')"))).success
    assert (await stub.Execute(code("import mine; print(mine.x)"))).output == "5\n"


async def test_interpreters_are_fresh(stub: Stub) -> None:
    source = "import sys, os; print(hasattr(sys, 'left'), os.getpid()); sys.left = 1"
    answers = [(await stub.Execute(code(source))).output.split() for _ in range(4)]
    assert [answer[0] for answer in answers] == ["False"] * 4
    assert len({answer[1] for answer in answers}) == 4


async def test_unicode_and_bytes_that_are_no_text(stub: Stub) -> None:
    source = "import os\nprint('é\U0001f40d\\udc80')\nos.write(1, b'a\\xffb\\xe2\\x82')"
    assert (await stub.Execute(code(source))).output == "é\U0001f40d\\udc80\na\ufffdb\ufffd"


async def test_stream_prints_as_it_happens(stub: Stub) -> None:
    source = "import time, os\nprint('one')\nwhile not os.path.exists('go'): time.sleep(0.01)\nprint('two')"
    call = stub.ExecuteStream(code(source))
    chunks = aiter(call)
    first = await anext(chunks)
    # It waits for a file that is made only now: "one" cannot have come with its end.
    assert first.output == "one\n"
    assert (await stub.Execute(code("open('go', 'w')"))).success
    rest = [chunk async for chunk in chunks]
    assert "".join(chunk.output for chunk in rest) == "two\n"
    assert rest[-1].WhichOneof("chunk") == "result"
    assert rest[-1].result.state == pb.EXECUTION_STATE_COMPLETED
    assert {chunk.execution_id for chunk in [first, *rest]} == {first.execution_id}
    assert first.execution_id
    assert all(abs(chunk.timestamp_ms - time.time() * 1000) < 60_000 for chunk in rest)


async def test_stream_separates_outputs_and_tells_the_failure(stub: Stub) -> None:
    source = "import sys; print('out'); print('err', file=sys.stderr); raise ValueError('no')"
    chunks = [chunk async for chunk in stub.ExecuteStream(code(source))]
    assert "".join(chunk.output for chunk in chunks) == "out\n"
    errors = "".join(chunk.error_output for chunk in chunks)
    assert errors.startswith("err\nTraceback")
    result = chunks[-1].result
    assert (result.success, result.error, result.state) == (
        False,
        "ValueError: no",
        pb.EXECUTION_STATE_FAILED,
    )


@pytest.mark.parametrize(
    "request_", [pb.ExecuteRequest(), pb.ExecuteRequest(cached="nobody"), pb.ExecuteRequest(cached="")]
)
async def test_no_source_is_an_answer(stub: Stub, request_: pb.ExecuteRequest) -> None:
    answer = await stub.Execute(request_)
    assert not answer.success
    assert "cached script" in answer.error
    chunks = [chunk async for chunk in stub.ExecuteStream(request_)]
    assert len(chunks) == 1
    assert chunks[0].execution_id == ""
    assert chunks[0].result.state == pb.EXECUTION_STATE_FAILED
    assert chunks[0].result.error == answer.error
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ExecuteAsync(request_)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_timeout_is_clamped_and_keeps_the_output(stub: Stub) -> None:
    output = ""
    for _ in range(20):  # A second may be over before the code has got as far as to print.
        began = time.monotonic()
        call = stub.ExecuteStream(code("print('before')\nwhile True: pass", timeout_ms=-5))
        async with asyncio.timeout(PATIENCE):
            chunks = [chunk async for chunk in call]
        assert time.monotonic() - began > 0.9
        result = chunks[-1].result
        assert (result.success, result.state) == (False, pb.EXECUTION_STATE_TIMEOUT)
        assert result.error == "timed out after 1000 ms"
        if output := "".join(chunk.output for chunk in chunks):
            break
    assert output == "before\n"


async def test_output_is_cut_visibly(stub: Stub) -> None:
    answer = await stub.Execute(code("print('x' * 19_990)\nprint('y' * 19_990)"))
    assert answer.success
    assert answer.output.startswith("x" * 19_990 + "\nyyyyyyyyy\n[output cut")
    assert answer.output.endswith("more than 20,000 characters]\n")


async def test_leaving_a_stream_ends_its_processes(stub: Stub, server: Server) -> None:
    source = """
import os, subprocess, time
child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
print(os.getpid(), child.pid)
time.sleep(1000)
"""
    call = stub.ExecuteStream(code(source))
    first = await anext(aiter(call))
    pids = [int(pid) for pid in first.output.split()]
    assert all(map(alive, pids))
    call.cancel()
    await until(lambda: not any(map(alive, pids)))
    ended = await stub.GetExecution(pb.GetExecutionRequest(execution_id=first.execution_id, wait=True))
    assert ended.state == pb.EXECUTION_STATE_CANCELLED


async def test_giving_up_on_execute_ends_its_processes(stub: Stub, server: Server) -> None:
    source = "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(1000)"
    call = stub.Execute(code(source))
    seen: list[str] = []

    async def started() -> None:
        while not (seen and seen[-1]):
            answer = await stub.Execute(
                code("import os\nprint(os.path.exists('pid') and open('pid').read())")
            )
            seen.append(answer.output.strip().removeprefix("False"))

    await asyncio.wait_for(started(), PATIENCE)
    call.cancel()
    await until(lambda: not alive(int(seen[-1])))


async def test_health_answers_while_eight_busy_loops_run(stub: Stub, server: Server) -> None:
    source = "import os\nprint(os.getpid(), os.nice(0), flush=True)\nwhile True: pass"
    calls = [stub.ExecuteStream(code(source, timeout_ms=120_000)) for _ in range(8)]
    firsts = await asyncio.gather(*(anext(aiter(call)) for call in calls))
    # That is as many as may run, and each of them gives way to the server.
    niceness = [int(first.output.split()[1]) for first in firsts]
    assert min(niceness) >= os.getpriority(os.PRIO_PROCESS, server.pid) + 10
    for _ in range(20):
        request = pb.HealthCheckRequest()
        assert (await stub.HealthCheck(request, timeout=PATIENCE)).healthy
    assert not any(call.done() for call in calls)
    for call in calls:
        call.cancel()
    pids = [int(first.output.split()[0]) for first in firsts]
    await until(lambda: not any(map(alive, pids)))
