"""How executions are confined on this machine; decided once, at start."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import _confine
from ._cgroup import PidsCgroups, find_pids_cgroups
from ._memory import Memory
from ._options import Options, OptionsError
from ._shared_memory import SharedMemory

log = logging.getLogger(__name__)

_OPEN_FILES = 1024
_CHECK_TIMEOUT = 10.0
_SHORT_TEMPORARY = Path(_confine.SHARED_MEMORY, "tmp")
_LONGEST_TEMPORARY = 107 - len("/pymp-xxxxxxxx/listener-xxxxxxxx")
"""Bytes: the kernel takes 107 as a Unix socket's path, and multiprocessing makes such sockets."""
_SUPERVISORS = {"process": 1, "bwrap": 2}
"""Processes in an execution's cgroup that are ours: the supervisor, and bwrap."""


class Containment:
    """What this kernel and user allow, and what each execution is started with.

    Args:
        options: Limits, and the isolation that was asked for.
        workspace: Working directory of all executions.
        temporary: Their TMPDIR.

    Raises:
        OptionsError: The isolation that was asked for cannot be had here.
    """

    def __init__(self, options: Options, workspace: Path, temporary: Path) -> None:
        self._options = options
        self._hide = [] if options.hide is None else [options.hide.resolve()]
        self.workspace = workspace
        self.temporary = temporary
        # Their identities at start: code that may write to the directory above can put a link in
        # the place of one, which must not let the next execution out. Held open, so that their
        # inode numbers are not used again.
        self._held = {
            path: os.open(path, os.O_PATH | os.O_CLOEXEC)
            for path in dict.fromkeys(self._writable())
            if os.path.exists(path)  # noqa: PTH110 - unlike Path.exists also where it is closed to us
        }
        self.environ = _environment(options, workspace, temporary)
        self.memory = Memory.find(options.memory_limit)
        self.prefix = self._bubblewrap() if options.isolation == "bwrap" else []
        # Namespaces already hide everything else.
        self._landlock = 0 if self.prefix else _confine.landlock_version()
        self.cgroups = self._find_cgroups()
        self.shared_memory = SharedMemory(in_namespaces=bool(self.prefix), needed=self._writable())
        self._code_temporary = self._short_temporary() or temporary
        if self.environ["TMPDIR"] == str(temporary):
            self.environ["TMPDIR"] = str(self._code_temporary)
        self._reads_environment = any(
            name.startswith("PYTHON") and name != "PYTHONDONTWRITEBYTECODE" and name in os.environ
            for name in options.pass_env
        )
        # Python may be installed below them, in a virtual environment for instance.
        self._shown = [
            str(path)
            for path in _readable()
            if any(path.resolve().is_relative_to(above) for above in self._hide)
        ]
        # A right to what is below it would hold for a hidden directory, too.
        covers_hidden = any(path.is_relative_to(_confine.SHARED_MEMORY) for path in self._hide)
        self._common: list[tuple[str, None]] = [] if covers_hidden else [(_confine.SHARED_MEMORY, None)]
        self._warn()
        if hidden := [
            path for path in self._hidden() if any(path.is_relative_to(w) for w in self._writable())
        ]:
            log.warning("%s lies where executions may write and so read: keep it elsewhere", hidden[0])

    @property
    def can_fork(self) -> bool:
        """Whether executions may be forks of a warm interpreter."""
        return not self.prefix and not self._reads_environment

    @property
    def writable_by_code(self) -> list[str] | None:
        """The directories that executions may write to; None: wherever this user may."""
        return [str(path) for path in self._writable()] if self._landlock else None

    def job(self, inherited: int = 0) -> dict[str, Any]:
        """The fields of a job that confine it; `inherited` bytes of writable memory are not its own."""
        options = self._options
        temporary = str(self.temporary), str(self._code_temporary)
        return {
            "cwd": str(self.workspace),
            "temporary": ("/tmp", "/tmp") if self.prefix else temporary,
            "script": f"sandbox-{os.urandom(16).hex()}.py",
            "reads_environment": self._reads_environment,
            "shared_memory": self.memory.each if self.shared_memory.private else 0,
            "limits": {
                # The memory watch lowers and raises it while the code runs.
                "RLIMIT_DATA": (self.memory.each + inherited, sys.maxsize),
                # The second one later is SIGKILL, for code that ignores SIGXCPU.
                "RLIMIT_CPU": (options.cpu_limit, options.cpu_limit + 1),
                "RLIMIT_FSIZE": (options.file_size_limit, options.file_size_limit),
                "RLIMIT_NOFILE": (_OPEN_FILES, _OPEN_FILES),
                "RLIMIT_CORE": (0, 0),
            },
            "max_processes": options.max_processes if self.counts_by_user else None,
            "landlock": self._landlock,
            "writable": [(str(path), _confine.identity(held)) for path, held in self._held.items()],
            "common": self._common,
            "hidden": [str(path) for path in self._hidden()],
            "readable": self._shown,
        }

    def _short_temporary(self) -> Path | None:
        """Where executions find their TMPDIR, if its own path is too long for sockets in it."""
        if not self.shared_memory.private or len(os.fsencode(self.temporary)) <= _LONGEST_TEMPORARY:
            return None
        return _SHORT_TEMPORARY

    def _writable(self) -> list[Path]:
        return [self.workspace, self.temporary, *self._options.writable]

    def _hidden(self) -> list[Path]:
        key = self._options.tls_key
        keys = [] if key is None or self._options.transport_mode == "insecure" else [key]
        return [*keys, *self._hide]

    @property
    def descriptors(self) -> list[int]:
        """Of the directories that `prefix` mounts; the process that it starts must inherit them."""
        return list(self._held.values()) if self._options.isolation == "bwrap" else []

    @property
    def max_processes(self) -> int:
        """The limit of an execution's cgroup: the code's processes, and our own."""
        return self._options.max_processes + _SUPERVISORS[self._options.isolation]

    @property
    def counts_by_user(self) -> bool:
        """Whether an execution's processes are limited with all others of this user."""
        return self.cgroups is None and os.geteuid() != 0

    def close(self) -> None:
        for descriptor in self._held.values():
            os.close(descriptor)
        if self.cgroups is not None:
            self.cgroups.remove()

    def _find_cgroups(self) -> PidsCgroups | None:
        try:
            return find_pids_cgroups()
        except OSError as error:
            if os.geteuid() == 0:
                log.warning(
                    "running as root without a pids cgroup (%s): nothing bounds the number of"
                    " processes, since RLIMIT_NPROC does not bind root; run as another user",
                    error,
                )
            else:
                log.info("no pids cgroup (%s): processes are counted by user", error)
            return None

    def _warn(self) -> None:
        log.info("memory: %s", self.memory.describe())
        if self._options.isolation == "bwrap":
            log.info("isolation: namespaces by bubblewrap")
            return
        version = self._landlock
        if version >= _confine.LANDLOCK_SCOPES:
            log.info("isolation: processes, with Landlock %d", version)
        elif version:
            log.warning("isolation: processes; Landlock %d does not stop signals to this server", version)
        else:
            log.warning(
                "isolation: processes only, since the kernel has no Landlock: code can write wherever"
                " this user can, and signal this server"
            )

    def _bubblewrap(self) -> list[str]:
        """The command line that puts an interpreter into namespaces of its own."""
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise OptionsError("isolation is 'bwrap': install bubblewrap, or use 'process'")
        arguments = [
            *("--die-with-parent", "--new-session", "--as-pid-1"),
            *("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"),
            *("--proc", "/proc", "--dev", "/dev", "--size", str(self.memory.each), "--tmpfs", "/dev/shm"),
            # Before the others: some of them may lie below it.
            *("--bind", self._source(self.temporary), "/tmp", "--setenv", "TMPDIR", "/tmp"),
        ]
        for path in _readable():
            kind = "--symlink" if path.is_symlink() else "--ro-bind"
            source = os.readlink(path) if path.is_symlink() else str(path)  # noqa: PTH115
            arguments += [kind, source, str(path)]
        for writable in (self.workspace, *self._options.writable):
            arguments += ["--bind", self._source(writable), str(writable)]
        arguments += ["--remount-ro", "/dev", "--remount-ro", "/"]
        command = [bwrap, *arguments, "--"]
        check = subprocess.run(  # noqa: S603
            [*command, sys.executable, "-I", "-c", "import ctypes"],
            env=self.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            pass_fds=self.descriptors,
            timeout=_CHECK_TIMEOUT,
            check=False,
        )
        if check.returncode:
            reason = check.stderr.decode(errors="replace").strip()
            raise OptionsError(f"isolation is 'bwrap', but bubblewrap fails here: {reason}")
        return command

    def _source(self, path: Path) -> str:
        """A path to the directory that was there at start, even if code has replaced it."""
        return f"/proc/self/fd/{self._held[path]}" if path in self._held else str(path)


def _readable() -> list[Path]:
    """The paths that an interpreter and its packages need."""
    system = [Path("/usr"), *(Path("/", name) for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"))]
    etc = [
        Path("/etc", name)
        for name in ("alternatives", "ld.so.cache", "localtime", "passwd", "group", "ssl", "mime.types")
    ]
    python = [Path(path) for path in (sys.prefix, sys.base_prefix, *sys.path) if path.startswith("/")]
    chosen: list[Path] = []
    for path in [*system, *etc, *python]:
        if path.exists() and not any(path.is_relative_to(above) for above in chosen):
            chosen.append(path)
    return chosen


def _environment(options: Options, workspace: Path, temporary: Path) -> dict[str, str]:
    """The environment of executions; it holds nothing of the server's own."""
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    passed = {name: os.environ[name] for name in options.pass_env if name in os.environ}
    return {
        "PATH": path,
        "HOME": str(workspace),
        "TMPDIR": str(temporary),
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        **passed,
    }
