"""Files below one directory, by paths that nothing can lead out of it.

The code of executions may change everything here at any moment, so each name is opened on its own,
relative to the directory before it, and never followed where it is a link: what openat2 does with
RESOLVE_BENEATH and RESOLVE_NO_SYMLINKS, without needing it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prodisco_sandbox.proto.paths import LONGEST

MOST_SEEN = 100_000
"""Entries that one listing looks at."""
MOST_NESTED = 100
"""Directories within each other that are removed in one call: each takes a descriptor meanwhile."""

_DIRECTORY = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_UPLOAD = ".prodisco-upload-"
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)
_PASSES = 3
_REALTIME_COARSE = 5
"""The clock by which the kernel dates files; it goes in steps of some milliseconds."""


def file_time() -> int:
    """The time, in ns since the Unix epoch, that a file changed now is dated with, or an earlier one."""
    return time.clock_gettime_ns(_REALTIME_COARSE)


def outlast(entry: Entry) -> None:
    """Blocks until `file_time` is past the last change of a file: for some milliseconds."""
    while entry.status is not None and file_time() <= entry.status.st_ctime_ns:
        time.sleep(0.001)


@dataclass(frozen=True, slots=True)
class Entry:
    """One file or directory."""

    path: str
    status: os.stat_result | None
    """None: its name is not UTF-8, and `path` names nothing."""

    @property
    def is_file(self) -> bool:
        return self.status is not None and stat.S_ISREG(self.status.st_mode)

    @property
    def is_directory(self) -> bool:
        return self.status is not None and stat.S_ISDIR(self.status.st_mode)


class Beneath:
    """The files below a directory. All methods block, and may run in any thread.

    Paths are given as the names that they consist of.

    Raises:
        OSError: The operating system's answer, or the same error for what is not allowed here.
    """

    def __init__(self, root: Path) -> None:
        # Held open: code may be able to put something else in its place.
        self._root = os.open(root, os.O_PATH | _DIRECTORY)
        with contextlib.suppress(OSError), self._reading([]) as here, os.scandir(here) as entries:
            for entry in entries:
                if entry.name.startswith(_UPLOAD):  # Of a server that was killed.
                    os.unlink(entry.name, dir_fd=self._root)

    def close(self) -> None:
        os.close(self._root)

    def stat(self, names: Sequence[str]) -> Entry:
        with self._directory(names[:-1]) as here:
            name = names[-1] if names else "."
            return Entry("/".join(names), os.stat(name, dir_fd=here, follow_symlinks=False))

    def listing(
        self, names: Sequence[str], limit: int, *, recursive: bool = False, since: int | None = None
    ) -> tuple[list[Entry], bool]:
        """What is in a directory, in order of path, and whether there is more.

        What cannot be read, or is removed meanwhile, is left out.

        Args:
            names: The directory.
            limit: The most entries of the answer.
            recursive: With all directories below it.
            since: Only files changed at this `file_time` or later, without those whose path, from
                here, has a name that begins with a dot.
        """
        found: list[Entry] = []
        seen, truncated = 0, False
        pending = deque([list(names)])
        while pending:
            place = pending.popleft()
            try:
                with self._reading(place) as here, os.scandir(here) as entries:
                    for entry in entries:
                        seen += 1
                        if seen > MOST_SEEN:
                            return sorted(found, key=_path), True
                        if (item := _entry(place, entry)) is None:
                            continue
                        hidden = since is not None and entry.name.startswith(".")
                        if recursive and item.is_directory and not hidden:
                            # The kernel takes no longer path, and so no client can ask for it.
                            too_long = len(item.path.encode()) > LONGEST - len("/x")
                            truncated |= too_long
                            pending += [] if too_long else [[*place, entry.name]]
                        if since is None or (not hidden and _is_new(item, since)):
                            if len(found) == limit:
                                return sorted(found, key=_path), True
                            found.append(item)
            except OSError:
                if seen or place != list(names):
                    continue
                raise
        return sorted(found, key=_path), truncated

    def open(self, names: Sequence[str]) -> int:
        """Opens a regular file for reading."""
        with self._directory(names[:-1]) as here:
            # By O_PATH first, which has no effect on a FIFO or a device.
            found = os.open(
                names[-1] if names else ".", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here
            )
        try:
            _check_regular(os.fstat(found))
            return os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(found)

    def make_directory(self, names: Sequence[str]) -> Entry:
        """Makes a directory and those above it, as far as they are missing."""
        with self._directory(names, make=True) as here:
            return Entry("/".join(names), os.fstat(here))

    def remove(self, names: Sequence[str], *, recursive: bool) -> None:
        if not names:
            raise OSError(errno.EINVAL, "the workspace itself cannot be removed")
        with self._directory(names[:-1]) as here:
            status = os.stat(names[-1], dir_fd=here, follow_symlinks=False)
            if not stat.S_ISDIR(status.st_mode):
                os.unlink(names[-1], dir_fd=here)
            elif recursive:
                _remove_tree(here, names[-1], 0)
            else:
                os.rmdir(names[-1], dir_fd=here)

    @contextlib.contextmanager
    def _directory(self, names: Sequence[str], *, make: bool = False) -> Iterator[int]:
        here = os.open(".", os.O_PATH | _DIRECTORY, dir_fd=self._root)
        try:
            for name in names:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, dir_fd=here)
                there = os.open(name, os.O_PATH | _DIRECTORY, dir_fd=here)
                os.close(here)
                here = there
            yield here
        finally:
            os.close(here)

    @contextlib.contextmanager
    def _reading(self, names: Sequence[str]) -> Iterator[int]:
        """A directory, open for reading its entries."""
        with self._directory(names) as here:
            there = os.open(".", os.O_RDONLY | _DIRECTORY, dir_fd=here)
        try:
            yield there
        finally:
            os.close(there)


class Upload:
    """A file that is being written: nobody sees it before `commit`, and without it nothing is left.

    Its content has no name until then, where the file system can do that (O_TMPFILE), so that it goes
    even if the server is killed; else a hidden one, which the next server removes.
    """

    def __init__(self, beneath: Beneath, names: Sequence[str]) -> None:
        self._beneath = beneath
        self._names = names
        self._file = -1
        self._temporary: str | None = None

    def begin(self) -> None:
        """Checks where the file is to be, as it is now, and opens what is written to."""
        root = self._beneath._root
        if not self._names:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with contextlib.suppress(FileNotFoundError):
            _check_regular(self._beneath.stat(self._names).status)
        try:
            self._file = os.open(".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o666, dir_fd=root)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
            self._temporary = _temporary_name()
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._file = os.open(self._temporary, flags, 0o666, dir_fd=root)

    def write(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Appends pieces: at most as many as the kernel takes in one call."""
        written = os.writev(self._file, pieces)
        if written < sum(map(len, pieces)):
            rest = memoryview(b"".join(pieces))[written:]
            while rest:  # The first call that writes nothing says why.
                rest = rest[os.write(self._file, rest) :]

    def commit(self) -> Entry:
        """Gives the file its name, and makes the directories above it."""
        root = self._beneath._root
        with self._beneath._directory(self._names[:-1], make=True) as here:
            if self._temporary is None:
                temporary = _temporary_name()
                os.link(f"/proc/self/fd/{self._file}", temporary, dst_dir_fd=root, follow_symlinks=True)
                self._temporary = temporary
            name = self._names[-1]
            # It replaces a link, where code has put one there meanwhile.
            os.rename(self._temporary, name, src_dir_fd=root, dst_dir_fd=here)
            self._temporary = None
            status = os.stat(name, dir_fd=here, follow_symlinks=False)
        own = os.fstat(self._file)
        if (status.st_dev, status.st_ino) != (own.st_dev, own.st_ino):
            raise OSError(errno.ESTALE, "code in the sandbox has replaced it meanwhile")
        return Entry("/".join(self._names), status)

    def close(self) -> None:
        """Leaves nothing behind but what was committed."""
        if self._temporary is not None:
            with contextlib.suppress(OSError):  # Code may have removed it.
                os.unlink(self._temporary, dir_fd=self._beneath._root)
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _temporary_name() -> str:
    return _UPLOAD + os.urandom(8).hex()


def _check_regular(status: os.stat_result | None) -> None:
    mode = 0 if status is None else status.st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a link, a device, a FIFO or a socket")


def _entry(place: Sequence[str], entry: os.DirEntry[str]) -> Entry | None:
    """None where it is gone by now."""
    try:
        status: os.stat_result | None = entry.stat(follow_symlinks=False)
    except OSError:
        return None
    try:
        entry.name.encode()
        name = entry.name
    except UnicodeEncodeError:
        name, status = os.fsencode(entry.name).decode("utf-8", "backslashreplace"), None
    return Entry("/".join([*place, name]), status)


def _path(entry: Entry) -> str:
    return entry.path


def _is_new(entry: Entry, since: int) -> bool:
    # By the change of the inode: code can set the other time to what it likes.
    return entry.is_file and entry.status is not None and entry.status.st_ctime_ns >= since


def _remove_tree(parent: int, name: str, depth: int) -> None:
    if depth >= MOST_NESTED:
        raise OSError(errno.ENOTEMPTY, f"directories are nested deeper than {MOST_NESTED}")
    here = os.open(name, os.O_RDONLY | _DIRECTORY, dir_fd=parent)
    try:
        for _ in range(_PASSES):  # Some file systems skip entries when others are removed meanwhile.
            with os.scandir(here) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        if entry.is_dir(follow_symlinks=False):
                            _remove_tree(here, entry.name, depth + 1)
                        else:
                            os.unlink(entry.name, dir_fd=here)
            try:
                os.rmdir(name, dir_fd=parent)
                return
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise
    finally:
        os.close(here)
    raise OSError(errno.ENOTEMPTY, "something is written to it all the time")
