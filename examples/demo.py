"""Sessions as an MCP server has them, each in a sandbox of its own, on this machine.

`make demo` runs it: real servers and real code, but processes instead of pods. On a
cluster there is no LocalCluster, and the manager's settings name a namespace; the rest is
the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from prodisco_sandbox import SandboxCapacityError, SandboxManager
from prodisco_sandbox.client import SandboxClient
from prodisco_sandbox.local import LocalCluster

ALICE = """\
import pathlib, time
pathlib.Path("diary.txt").write_text("met the owl at noon")
for step in range(1, 5):
    print(f"page {step} of 4", flush=True)
    time.sleep(0.15)
"""
BOB = """\
import pathlib, time
primes = [n for n in range(2, 60) if all(n % d for d in range(2, n))]
pathlib.Path("primes.txt").write_text(repr(primes))
for start in range(0, 15, 5):
    print(*primes[start:start + 5], flush=True)
    time.sleep(0.2)
"""
FILES = "import os; print(*sorted(os.listdir()) or ['nothing'])"


class Demo:
    """Tells what happens as it happens, and counts what should not have."""

    def __init__(self) -> None:
        self.failures = 0
        self._begun = time.monotonic()

    def say(self, who: str, text: str) -> None:
        print(f"{time.monotonic() - self._begun:6.2f} s  {who:8}{text}", flush=True)

    def check(self, who: str, text: str, *, ok: bool) -> None:
        self.failures += not ok
        self.say(who, text if ok else f"FAILED: this should be true: {text}")

    async def play(self, manager: SandboxManager, cluster: LocalCluster) -> None:
        """All scenes, with a manager that has room for three sessions."""
        self.say("", "Two sessions begin at the same time, and each gets a sandbox of its own.")
        # While a session is entered, it is in use, however long nothing is run.
        async with contextlib.AsyncExitStack() as entered:
            alice, bob = await asyncio.gather(
                *(self.begin(manager, who, entered) for who in ("alice", "bob"))
            )
            self.say("", "Both run code; the output comes while it is printed.")
            await asyncio.gather(self.stream("alice", alice, ALICE), self.stream("bob", bob, BOB))
            self.say("", "Files stay for the session's next call, and nobody else sees them.")
            await self.sees("alice", alice, "diary.txt")
            await self.sees("bob", bob, "primes.txt")
            await self.share(manager)
            await self.refuse(manager)
        await self.reap(manager, alice, bob)
        await self.close(manager, cluster)
        self.say("", "The server shuts down.")

    async def begin(
        self, manager: SandboxManager, who: str, entered: contextlib.AsyncExitStack
    ) -> SandboxClient:
        begun = time.monotonic()
        client = await entered.enter_async_context(manager.session(who))
        took = time.monotonic() - begun
        self.say(who, f"has {manager.sandbox_name(who)[:16]}..., ready after {took:.2f} s")
        return client

    async def stream(self, who: str, client: SandboxClient, code: str) -> None:
        async with client.execute_stream(code) as chunks:
            async for chunk in chunks:
                for line in chunk.text.splitlines():
                    self.say(who, f"| {line}")
                if chunk.result is not None:
                    took = chunk.result.execution_time_ms / 1000
                    self.check(who, f"the code has succeeded, in {took:.2f} s", ok=chunk.result.success)

    async def sees(self, who: str, client: SandboxClient, expected: str) -> None:
        result = await client.execute(FILES)
        found = result.output.strip() or str(result.error)
        self.check(who, f"sees {found}", ok=found == expected)

    async def share(self, manager: SandboxManager) -> None:
        before = manager.stats().created
        self.say("", "Five calls of a third session come before it has a sandbox.")
        clients = await asyncio.gather(*(manager.get_client("carol") for _ in range(5)))
        sandboxes = {client.sandbox for client in clients}
        created = manager.stats().created - before
        one = len(sandboxes) == created == 1
        self.check("carol", f"5 callers share {len(sandboxes)} sandbox, {created} was made", ok=one)

    async def refuse(self, manager: SandboxManager) -> None:
        self.say("", "A fourth session is one too many.")
        try:
            await manager.on_session_initialized("dave")
        except SandboxCapacityError as e:
            self.say("dave", f"is refused: {e}")
        else:
            self.check("dave", "is refused", ok=False)

    async def reap(self, manager: SandboxManager, alice: SandboxClient, bob: SandboxClient) -> None:
        self.say("", "Bob and Carol fall silent, while Alice's code runs on.")
        begun, reaped = time.monotonic(), 0
        async with alice.execute_stream("import time; time.sleep(60)"):
            while reaped < 2 and time.monotonic() < begun + 60:
                await asyncio.sleep(0.02)
                reaped = manager.stats().reaped
            took = time.monotonic() - begun
            self.check("", f"{reaped} idle sandboxes have been reaped, after {took:.2f} s", ok=reaped == 2)
            self.say("bob", "asks again")
            again = await manager.get_client("bob")
            self.check("bob", "has another sandbox: see client.sandbox", ok=again.sandbox != bob.sandbox)
            await self.sees("bob", again, "nothing")
            same = (await manager.get_client("alice")).sandbox == alice.sandbox
            self.check("alice", "still has hers: busy is not idle", ok=same)
            await self.sees("alice", alice, "diary.txt")

    async def close(self, manager: SandboxManager, cluster: LocalCluster) -> None:
        name = manager.sandbox_name("alice")
        await manager.on_session_closed("alice")
        names = [sandbox["metadata"]["name"] for sandbox in cluster.custom_objects_api.objects]
        self.check("alice", "has left, and her sandbox is deleted", ok=name not in names)

    async def suspend(self, cluster: LocalCluster) -> None:
        self.say("", "Where idle sandboxes are suspended, a session comes back to its files.")
        config = cluster.config(
            on_idle="suspend", session_idle_timeout=0.3, idle_check_interval=0.1, warm_pool=None
        )
        api = cluster.custom_objects_api
        async with SandboxManager(config, custom_objects_api=api) as manager:
            async with contextlib.AsyncExitStack() as entered:
                client = await self.begin(manager, "erin", entered)
                await client.execute("open('draft.txt', 'w').write('chapter one')")
            begun = time.monotonic()
            await api.until(lambda: any(map(_is_suspended, api.objects)), timeout=60)
            took = time.monotonic() - begun
            target = cluster.endpoint(api.get(manager.sandbox_name("erin")))
            self.check("erin", f"has no server any more, after {took:.2f} s", ok=target is None)
            async with contextlib.AsyncExitStack() as entered:
                client = await self.begin(manager, "erin", entered)
                await self.sees("erin", client, "draft.txt")
            self.check("erin", "was resumed, in the same Sandbox", ok=manager.stats().resumed == 1)

    async def compare(self, cluster: LocalCluster) -> None:
        self.say("", "A server that was started ahead, beside one that starts for its session.")
        took = {}
        for who, pool in (("cold", None), ("warm", "local")):
            config = cluster.config(warm_pool=pool)
            async with SandboxManager(config, custom_objects_api=cluster.custom_objects_api) as manager:
                begun = time.monotonic()
                await manager.get_client(who)
                took[who] = time.monotonic() - begun
                self.say(who, f"get_client takes {took[who]:.3f} s")
        ok = manager.stats().warm == 1
        self.check("warm", f"it was there already: {took['cold'] / took['warm']:.0f} times as fast", ok=ok)


class Traces:
    """Processes and files of the demo, to be looked for when it is over."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._seen: set[tuple[int, int]] = set()

    async def follow(self) -> None:
        """Notes every process that comes up below this one, for ever."""
        while True:
            table = _processes()
            found = {os.getpid()}
            # Parents first; process ids alone start anew some time.
            for pid in sorted(table, key=lambda pid: (table[pid][1], pid)):
                if table[pid][0] in found:
                    found.add(pid)
                    self._seen.add((pid, table[pid][1]))
            await asyncio.sleep(0.05)

    def count(self) -> int:
        return len(self._seen)

    def left(self) -> tuple[int, int]:
        """How many of the processes still run, and how many files are there."""
        running = {(pid, begun) for pid, (_, begun) in _processes().items()}
        files = [self._directory, *self._directory.rglob("*")] if self._directory.exists() else []
        return len(self._seen & running), len(files)


def _is_suspended(sandbox: dict[str, Any]) -> bool:
    conditions = (sandbox.get("status") or {}).get("conditions") or ()
    return any((c["type"], c["status"]) == ("Suspended", "True") for c in conditions)


def _processes() -> dict[int, tuple[int, int]]:
    """Parent and time of start of every process that runs."""
    table = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, *fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # It has just ended.
            continue
        if state != "Z":
            table[int(path.parent.name)] = int(parent), int(fields[17])
    return table


async def run() -> int:
    demo = Demo()
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    traces = following = None
    try:
        async with LocalCluster(warm=1) as cluster:
            traces = Traces(cluster.directory)
            following = asyncio.create_task(traces.follow(), name="traces")
            # Without the warm pool at first, so that every session's own server is seen to come and go.
            config = cluster.config(
                max_sessions=3, session_idle_timeout=0.8, idle_check_interval=0.1, warm_pool=None
            )
            async with SandboxManager(config, custom_objects_api=cluster.custom_objects_api) as manager:
                await demo.play(manager, cluster)
            await demo.suspend(cluster)
            await demo.compare(cluster)
    except asyncio.CancelledError:
        demo.say("", "Interrupted.")
        raise
    finally:
        if traces is not None and following is not None:
            following.cancel()
            processes, files = traces.left()
            text = f"nothing left behind: {processes} processes of {traces.count()}, {files} files"
            demo.check("", text, ok=(processes, files) == (0, 0))
    counts = ", ".join(f"{name} {count}" for name, count in dataclasses.asdict(manager.stats()).items())
    print(f"\nstats(): {counts}\nchecks that failed: {demo.failures}")
    return 1 if demo.failures else 0


def main() -> int:
    try:
        return asyncio.run(run())
    except KeyboardInterrupt:
        return 130
    except asyncio.CancelledError:
        return 143


if __name__ == "__main__":
    sys.exit(main())
