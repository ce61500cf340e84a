"""What an execution gives up before its code runs.

Runs in the process that is to run the code; standard library only. The steps are system
calls without a wrapper in the standard library, so they use ctypes; the numbers are those of
the kernel's headers (linux/prctl.h, linux/landlock.h, linux/capability.h).
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]
import ctypes
import os
import resource
import stat
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38

_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWIPC = 0x0002_0000, 0x1000_0000, 0x0800_0000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x4_0000

_CAPABILITY_VERSION_3 = 0x20080522

# The same numbers on every architecture except alpha.
_SYS_LANDLOCK_CREATE_RULESET = 444
_SYS_LANDLOCK_ADD_RULE = 445
_SYS_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_RULE_PATH_BENEATH = 1
_LANDLOCK_VERSION_FLAG = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REMOVE_AND_MAKE = sum(1 << bit for bit in range(4, 13))
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS = 0b11
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE

LANDLOCK_SCOPES = 6
"""Since this version Landlock keeps signals inside, too."""

_ENDIAN = sys.byteorder
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")

_libc = ctypes.CDLL(None, use_errno=True)
# Made here, so that executions which are forked do not each make these types.
_Header, _Capabilities, _Ruleset = ctypes.c_uint32 * 2, ctypes.c_uint32 * 6, ctypes.c_uint64 * 3


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _prctl(option: int, value: int) -> None:
    zero = ctypes.c_ulong(0)
    _check(_libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero), f"prctl({option}, {value})")


def become_subreaper() -> None:
    """Makes orphaned descendants children of this process, not of init."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def hide_from_same_user() -> None:
    """Keeps this process's /proc/PID/environ, fd and mem from others of the same user."""
    _prctl(_PR_SET_DUMPABLE, 0)


def let_be_seen() -> None:
    """Undoes `hide_from_same_user`, which children inherit."""
    _prctl(_PR_SET_DUMPABLE, 1)


def flush_c_streams() -> None:
    """Writes what C code has printed and not flushed."""
    _libc.fflush(None)


def die_with(parent: int) -> None:
    """Has the kernel kill this process as soon as its parent is gone."""
    _prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(1)


def give_up_privileges() -> None:
    """No privileges from setuid files, and no capabilities, not even as root."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    header = _Header(_CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(header, _Capabilities()), "capset")


def set_limits(limits: dict[str, tuple[int, int]]) -> None:
    """Sets soft and hard limits by name, such as ``RLIMIT_AS``; never raises one."""
    for name, (soft, hard) in limits.items():
        number = getattr(resource, name)
        present = resource.getrlimit(number)[1]
        if present != resource.RLIM_INFINITY:
            soft, hard = min(soft, present), min(hard, present)  # noqa: PLW2901
        resource.setrlimit(number, (soft, hard))


def yield_to_the_server() -> None:
    """Last in line for the processor, first in line when memory runs out."""
    os.nice(10)
    with open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
        file.write("1000")


SHARED_MEMORY = "/dev/shm"


def own_shared_memory(size: int) -> None:
    """Gives this process and its descendants shared memory that no other process sees.

    It is gone with the last of them: POSIX semaphores and segments, at most `size` bytes of
    them, and those of System V. As an ordinary user this takes a user namespace, in which
    this user keeps its number and all others are "nobody".

    Raises:
        OSError: This kernel, container or user has no namespaces, or no ``/dev/shm``.
    """
    user, group = os.geteuid(), os.getegid()
    namespaces = _CLONE_NEWNS | _CLONE_NEWIPC
    if _libc.unshare(namespaces) < 0:
        _check(_libc.unshare(namespaces | _CLONE_NEWUSER), "unshare")
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123
                file.write(text)
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE, None)
    _mount(b"tmpfs", SHARED_MEMORY, b"tmpfs", _MS_NOSUID | _MS_NODEV, f"mode=1777,size={size}")


def move(source: str, target: str, known: tuple[int, int] | None) -> None:
    """Shows a directory at another, new path, too, to those that share this process's namespace.

    Only while it has the `identity` that is known; else the new path is an empty directory.
    """
    os.mkdir(target, 0o700)  # noqa: PTH102
    try:
        held = os.open(source, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # An earlier execution has removed it, or closed it to us.
    try:
        # Mounts the directory that is checked here, even if code replaces it at its path.
        if known == identity(held):
            _mount(f"/proc/self/fd/{held}".encode(), target, None, _MS_BIND, None)
    except FileNotFoundError:
        return  # It was removed just now.
    finally:
        os.close(held)


def _mount(source: bytes | None, target: str, kind: bytes | None, flags: int, data: str | None) -> None:
    options = None if data is None else data.encode()
    _check(_libc.mount(source, target.encode(), kind, ctypes.c_ulong(flags), options), f"mount({target})")


def landlock_version() -> int:
    """The kernel's Landlock version; 0 where it has none."""
    version: int = _libc.syscall(
        _SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_LANDLOCK_VERSION_FLAG)
    )
    return max(0, version)


def identity(path: str | os.PathLike[str] | int) -> tuple[int, int]:
    """Device and inode: they differ for a file that was put in the place of another."""
    status = os.stat(path)  # noqa: PTH116
    return status.st_dev, status.st_ino


def landlock(
    version: int,
    writable: Sequence[tuple[str, tuple[int, int] | None]],
    hidden: Sequence[str],
    readable: Sequence[str] = (),
) -> None:
    """Confines this process and its descendants for good; needs no_new_privs.

    They can write only below `writable` (a path counts only while it has the `identity`
    given with it, if any), and cannot read the files `hidden`, nor anything in directories
    among them but what is `writable` or `readable`. They cannot trace (and so not see into)
    processes outside; from `LANDLOCK_SCOPES` on they cannot signal those either.
    """
    write = _WRITE_FILE | _REMOVE_AND_MAKE
    write |= (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
    read = _EXECUTE | _READ_FILE | _READ_DIR if hidden else 0
    scoped = _SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS if version >= LANDLOCK_SCOPES else 0
    attributes = _Ruleset(write | read, 0, scoped)
    # Older kernels know fewer fields, and refuse a size beyond their own only if the
    # rest is not zero; 0 for networks, which stay open.
    ruleset = _check(
        _libc.syscall(
            _SYS_LANDLOCK_CREATE_RULESET,
            attributes,
            ctypes.c_size_t(ctypes.sizeof(attributes)),
            ctypes.c_uint32(0),
        ),
        "landlock_create_ruleset",
    )
    try:
        for path in _DEVICES:
            _allow(ruleset, path, _WRITE_FILE | (_READ_FILE & read))
        for path, known in writable:
            _allow(ruleset, path, write | read, known)
        carved, allowed = _all_but(hidden)
        # A right to list a directory holds for those below it, too.
        for path in () if any(map(os.path.isdir, hidden)) else carved:
            _allow(ruleset, path, _READ_DIR)
        for path in (*allowed, *readable):
            _allow(ruleset, path, read)
        _check(
            _libc.syscall(_SYS_LANDLOCK_RESTRICT_SELF, ruleset, ctypes.c_uint32(0)), "landlock_restrict_self"
        )
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int, known: tuple[int, int] | None = None) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # what is not there, or closed to us anyway, or a link to itself, needs no permission
    try:
        if known and known != identity(descriptor):
            return  # an earlier execution put something else there, such as a link to outside
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _ON_FILES
        # struct landlock_path_beneath_attr is packed: a 64-bit mask and a descriptor.
        rule = rights.to_bytes(8, _ENDIAN) + descriptor.to_bytes(4, _ENDIAN)
        _check(
            _libc.syscall(
                _SYS_LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_RULE_PATH_BENEATH, rule, ctypes.c_uint32(0)
            ),
            f"landlock_add_rule({path})",
        )
    finally:
        os.close(descriptor)


def _all_but(hidden: Sequence[str]) -> tuple[list[str], list[str]]:
    """The directories above the hidden paths, and the paths of all that is beside them."""
    hidden = [os.path.realpath(path) for path in hidden]
    directories: list[str] = []
    for path in hidden:
        while path != "/":
            path = os.path.dirname(path)  # noqa: PLW2901, PTH120
            if path not in directories:
                directories.append(path)
    allowed: list[str] = []
    for directory in directories:
        try:
            entries = os.scandir(directory)
        except PermissionError:
            continue  # What this user cannot list is allowed to nobody.
        with entries:
            allowed += [
                entry.path
                for entry in entries
                if entry.path not in hidden and entry.path not in directories and not entry.is_symlink()
            ]
    return directories, allowed
