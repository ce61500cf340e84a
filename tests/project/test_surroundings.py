"""What the suite itself promises: it depends on nothing that it inherits, and blames the right test."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support import ROOT, leftovers
from tests.support.leftovers import children, kept_open, left_running, open_files
from tests.support.patience import PATIENCE


def signals_of_a_child() -> dict[str, set[int]]:
    """The signals that a child process ignores and blocks."""
    code = "print(open('/proc/self/status').read())"
    status = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    masks = re.findall(r"^Sig(Ign|Blk):\s+(\w+)", status, re.MULTILINE)
    # Not those of the C library, which posix_spawn leaves ignored.
    return {name: {n for n in signal.valid_signals() if int(mask, 16) >> n - 1 & 1} for name, mask in masks}


def test_children_have_the_default_of_every_signal() -> None:
    pythons_own = {signal.SIGPIPE, signal.SIGXFSZ}
    assert signals_of_a_child() == {"Ign": pythons_own, "Blk": set()}


@pytest.mark.slow
def test_it_can_be_started_with_signals_ignored_and_says_last_what_was_skipped() -> None:
    chosen = [
        f"{__file__}::{test_children_have_the_default_of_every_signal.__name__}",
        "tests/envtest/test_rights.py",
    ]
    done = subprocess.run(
        [
            *("/bin/sh", "-c", 'trap "" HUP INT TERM USR1 CHLD; exec "$@"', "sh"),
            *(sys.executable, "-m", "pytest", "--numprocesses=2", "-v", *chosen),
        ],
        cwd=ROOT,
        env={
            name: value
            for name, value in os.environ.items()
            if name not in ("KUBEBUILDER_ASSETS", "PRODISCO_MUST_RUN")
        },
        stdout=subprocess.PIPE,
        text=True,
        timeout=2 * PATIENCE,
    )
    assert done.returncode == 0, done.stdout
    *_, closing, last = done.stdout.splitlines()
    assert "1 passed" in closing
    skipped = re.search(r"(\d+) skipped", closing)
    assert skipped is not None
    assert last == f"skipped: {skipped[1]} envtest (KUBEBUILDER_ASSETS is not set)"
    workers = re.findall(r"^\[(\w+)\] .* SKIPPED tests/envtest/", done.stdout, re.MULTILINE)
    assert len(workers) == int(skipped[1]) > 3
    assert len(set(workers)) == 1, "they share what takes seconds to start"


def test_what_is_open_for_a_moment_is_not_left_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_files()
    file = (tmp_path / "resolv.conf").open("w")
    between_two_looks = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: file.close())
    monkeypatch.setattr(leftovers, "time", between_two_looks)
    assert kept_open(before) == []
    assert file.closed, "it was open at the first look"


def test_what_stays_open_is_left_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "SETTLING", 0.05)
    before = open_files()
    with (tmp_path / "diary.txt").open("w") as file:
        assert kept_open(before) == [(file.fileno(), str(tmp_path / "diary.txt"))]


def test_a_child_that_is_waited_for_meanwhile_is_not_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    before = children()
    child = subprocess.Popen(["sleep", "1000"])
    child.kill()
    waited = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: child.wait())
    monkeypatch.setattr(leftovers, "time", waited)
    assert left_running(before) == []
    assert child.returncode is not None, "it was there at the first look"


def test_a_child_that_runs_on_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "SETTLING", 0.05)
    before = children()
    with subprocess.Popen(["sleep", "1000"]) as child:
        assert left_running(before) == [child.pid]
        child.kill()


def test_a_python_whose_path_has_a_space_makes_environments(tmp_path: Path) -> None:
    python = tmp_path / "a b" / "python"
    python.parent.mkdir()
    python.symlink_to(Path(sys.executable).resolve())
    environment = {**os.environ, "PYTHON": str(python)}
    assert (
        subprocess.check_output([ROOT / "tools" / "find-python"], text=True, env=environment) == f"{python}\n"
    )
