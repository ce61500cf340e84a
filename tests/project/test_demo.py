"""`make demo`: it runs, and ends well however it ends."""

from __future__ import annotations

import html
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.local import traces
from tests.support.patience import PATIENCE

DEMO = ROOT / "examples/demo.py"

MILESTONES = [
    r"alice +has sandbox-\w{8}\.\.\., ready after",
    r"bob +\| 2 3 5 7 11",
    r"alice +\| page 4 of 4",
    r"alice +sees diary.txt",
    r"bob +sees primes.txt",
    r"carol +5 callers share 1 sandbox, 1 was made",
    r"dave +is refused: all 3 sandbox slots are taken",
    r"2 idle sandboxes have been reaped",
    r"bob +has another sandbox",
    r"bob +sees nothing",
    r"alice +has left, and her sandbox is deleted",
    r"erin +has sandbox-\w{8}\.\.\., ready after",
    r"erin +has no server any more, after \d",
    r"erin +sees draft.txt",
    r"erin +was resumed, in the same Sandbox",
    r"cold +get_client takes \d",
    r"warm +get_client takes \d",
    r"warm +it was there already: \d+ times as fast",
    r"nothing left behind: 0 processes of \d\d+, 0 files",
    # Bob's second one too, if the rest took so long.
    r"created 4, recreated 1, reaped [23], evicted 0, lost 0, failed 0, delete_retries 0",
    r"checks that failed: 0",
]


INTERRUPTED = {
    # When, by a line of the output, at which it stands still, and the exit status.
    signal.SIGTERM: ("Two sessions begin", 143),
    signal.SIGINT: ("page 2", 130),
}


HELD = """\
import importlib.util, sys
path, moment = sys.argv[1:]
spec = importlib.util.spec_from_file_location("demo", path)
demo = importlib.util.module_from_spec(spec)
sys.modules["demo"] = demo
spec.loader.exec_module(demo)
say = demo.Demo.say

def say_and_wait(self, who, text):
    say(self, who, text)
    if moment in text:
        sys.stdin.readline()

demo.Demo.say = say_and_wait
sys.exit(demo.main())
"""


class Run(threading.Thread):
    """A demo with a directory for temporary files of its own, and perhaps a signal half-way."""

    def __init__(self, directory: Path, number: signal.Signals | None = None, moment: str = "") -> None:
        super().__init__()
        directory.mkdir()
        self.directory = directory
        self.output = ""
        self.then: list[str] = []
        self._signal = number, moment
        self.process = subprocess.Popen(
            [sys.executable, str(DEMO)]
            if number is None
            else [sys.executable, "-c", HELD, str(DEMO), moment],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd="/",
            env={**os.environ, "TMPDIR": str(directory)},
        )

    def run(self) -> None:
        number, moment = self._signal
        with self.process as process:
            assert process.stdin is not None
            assert process.stdout is not None
            for line in process.stdout:
                self.output += line
                if number is not None and moment in line and not self.then:
                    self.then = traces(self.directory)
                    process.send_signal(number)
                    print(file=process.stdin, flush=True)


@pytest.fixture(scope="module")
def demos(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Run]]:
    """One that runs to its end and one for each signal, as tests are chosen; all at once, to save time."""
    base = tmp_path_factory.mktemp("demo")
    chosen = {item.name for item in request.session.items if item.path == request.path}
    runs = {"whole": Run(base / "whole")} if test_it_runs.__name__ in chosen else {}
    for number, (moment, _) in INTERRUPTED.items():
        if f"{test_it_ends_well_when_it_is_interrupted.__name__}[{number}]" in chosen:
            runs[number.name] = Run(base / number.name, number, moment)
    for run in runs.values():
        run.start()
    yield runs
    for run in runs.values():
        run.process.kill()
        run.join()


@pytest.mark.slow
@pytest.mark.parametrize("number", INTERRUPTED)
def test_it_ends_well_when_it_is_interrupted(demos: dict[str, Run], number: signal.Signals) -> None:
    demo = demos[number.name]
    demo.join(2 * PATIENCE)
    assert demo.process.returncode == INTERRUPTED[number][1], demo.output
    assert demo.then, "it had started nothing"
    assert "Interrupted." in demo.output
    assert "nothing left behind: 0 processes" in demo.output
    assert "Traceback" not in demo.output
    assert traces(demo.directory) == []


def test_the_picture_in_readme_is_what_it_prints() -> None:
    picture = (ROOT / "docs/demo.svg").read_text()
    printed = html.unescape(re.sub(r"<[^>]*>", "", picture)).replace("\xa0", " ")
    until = next(number for number, text in enumerate(MILESTONES) if "has left" in text)
    for milestone in MILESTONES[:until]:
        assert re.search(milestone, printed), milestone


@pytest.mark.slow
def test_it_runs(demos: dict[str, Run]) -> None:
    demo = demos["whole"]
    demo.join(2 * PATIENCE)
    assert demo.process.returncode == 0, demo.output
    assert traces(demo.directory) == []
    at = 0
    for milestone in MILESTONES:
        found = re.compile(milestone).search(demo.output, at)
        assert found, f"{milestone} is not there, or not in its place:\n{demo.output}"
        # What two sessions say at the same time comes in any order.
        at = found.start() if milestone.startswith("dave") else at
