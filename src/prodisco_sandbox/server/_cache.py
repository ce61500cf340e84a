"""Scripts that succeeded, kept on disk."""

from __future__ import annotations

import ast
import hashlib
import io
import logging
import os
import re
import stat
import tempfile
import threading
import tokenize
import weakref
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

DESCRIPTION = 200
"""Characters of a description."""
_DESCRIBED = 1 << 16
"""Characters of a script up to which it is parsed for one, which takes hundreds of bytes for each."""
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,40}-[0-9a-f]{12}")
_SUFFIX = ".py"


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One script.

    Attributes:
        name: Made here, of its description and hash: safe as a file name.
        description: From its docstring or first comment; may be empty.
        created_at_ms: Unix milliseconds.
        content_hash: SHA-256 of its UTF-8 text, in hex.
        size: Bytes of text.
    """

    name: str
    description: str
    created_at_ms: int
    content_hash: str
    size: int


class ScriptCache:
    """A directory of scripts, which other servers may share and code may have changed.

    A file counts only if its name holds its text's hash; all others are left alone.
    Every method does blocking I/O, and may be called from any thread.

    Args:
        directory: Where they are; must exist.
        limit: Bytes of text; past that the oldest go.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        # Held, since code may be able to put a link to elsewhere in its place.
        held = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, held)
        self._directory = Path(f"/proc/self/fd/{held}")
        self._limit = limit
        self._lock = threading.RLock()
        self._known: dict[tuple[str, int, int], CacheEntry | None] = {}

    def entries(self, substring: str = "") -> list[CacheEntry]:
        """All of them, newest first; only those whose name or description holds the text."""
        with self._lock:
            self._known = self._scan()
            known = [entry for entry in self._known.values() if entry]
        wanted = substring.casefold()
        chosen = [e for e in known if wanted in f"{e.name}\n{e.description}".casefold()]
        return sorted(chosen, key=lambda entry: (-entry.created_at_ms, entry.name))

    def _scan(self) -> dict[tuple[str, int, int], CacheEntry | None]:
        found: dict[tuple[str, int, int], CacheEntry | None] = {}
        try:
            files = os.scandir(self._directory)
        except FileNotFoundError:  # Code may be able to remove it.
            return found
        with files:
            for file in files:
                name = file.name.removesuffix(_SUFFIX)
                if not file.name.endswith(_SUFFIX) or not _NAME.fullmatch(name):
                    continue
                try:
                    status = file.stat(follow_symlinks=False)
                    key = (name, status.st_mtime_ns, status.st_size)
                    if not stat.S_ISREG(status.st_mode):
                        continue
                    found[key] = self._known[key] if key in self._known else self._read(name)[0]
                except OSError as error:
                    log.warning("cached script %s cannot be read: %s", name, error)
        return found

    def source(self, name: str) -> str | None:
        """The text of the script of that name, or None."""
        if not _NAME.fullmatch(name):
            return None
        try:
            entry, text = self._read(name)
        except OSError:
            return None
        return text if entry else None

    def add(self, source: str) -> CacheEntry | None:
        """Keeps a script; None if it is there already, is blank, or is too large.

        Raises:
            OSError: It cannot be written.
        """
        data = source.encode()
        if not source.strip() or len(data) > self._limit:
            return None
        name = f"{_slug(describe(source))}-{hashlib.sha256(data).hexdigest()[:12]}"
        with self._lock:
            if self._path(name).exists() and self._read(name)[0]:
                return None
            present = self.entries()
            total = len(data) + sum(entry.size for entry in present)
            while total > self._limit:
                oldest = present.pop()
                total -= oldest.size
                self._path(oldest.name).unlink(missing_ok=True)
            self._write(name, data)
            return self._read(name)[0]

    def clear(self) -> int:
        """Removes all of them; returns how many."""
        with self._lock:
            entries = self.entries()
            for entry in entries:
                self._path(entry.name).unlink(missing_ok=True)
        return len(entries)

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}{_SUFFIX}"

    def _read(self, name: str) -> tuple[CacheEntry | None, str]:
        # Code may have put a link, a pipe or a directory in its place.
        descriptor = os.open(self._path(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)  # `open` would leave a directory's open.
            return None, ""
        with open(descriptor, "rb") as file:  # noqa: PTH123
            data = file.read(self._limit + 1)
        digest = hashlib.sha256(data).hexdigest()
        if not name.endswith(f"-{digest[:12]}"):
            log.warning("cached script %s does not match its hash; it is ignored", name)
            return None, ""
        try:
            text = data.decode()
        except UnicodeDecodeError:  # Nothing that was cached here, whatever its name says.
            return None, ""
        return CacheEntry(name, describe(text), int(status.st_mtime * 1000), digest, len(data)), text

    def _write(self, name: str, data: bytes) -> None:
        descriptor, temporary = tempfile.mkstemp(prefix=".new-", dir=self._directory)
        try:
            with open(descriptor, "wb") as file:  # noqa: PTH123
                file.write(data)
            Path(temporary).replace(self._path(name))
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def describe(source: str) -> str:
    """The first line of the docstring, else the first comment; empty without either, or if it is long."""
    if len(source) > _DESCRIBED:
        return ""
    try:
        text = ast.get_docstring(ast.parse(source)) or _first_comment(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError):
        return ""
    lines = text.strip().splitlines()
    return lines[0].strip()[:DESCRIPTION] if lines else ""


def _first_comment(source: str) -> str:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith("#!"):
            return token.string.lstrip("#").strip()
    return ""


def _slug(description: str) -> str:
    words = re.findall(r"[a-z0-9]+", description.lower())
    return "-".join(words)[:40].strip("-") or "script"
