"""Static bearer tokens, in a file that is read again when it changes."""

from __future__ import annotations

import hashlib
import hmac
import re
from pathlib import Path

from .._log import get_logger

log = get_logger("audit")

MIN_TOKEN = 16
"""The fewest characters of a token."""
# The characters that RFC 6750 lets a bearer token have.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")


class TokenFile:
    """The tokens of a file: a name and a token on each line.

    Raises:
        ValueError: The file is wrong; the message names the line, and never a token.
        OSError: It cannot be read.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._version = self._look()
        self._names = self._read()

    def find(self, token: str) -> str | None:
        """The name of a token's owner. A file that has turned bad leaves the tokens as they were."""
        version = self._look()
        if version != self._version:
            self._version = version
            try:
                self._names = self._read()
            except (OSError, ValueError) as error:
                log.warning("auth_tokens_kept", error=str(error), tokens=len(self._names))
        # All are compared, so the time tells nothing.
        found = [name for known, name in self._names.items() if hmac.compare_digest(known, _digest(token))]
        return found[0] if found else None

    def _look(self) -> tuple[int, ...] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mode, found.st_mtime_ns

    def _read(self) -> dict[bytes, str]:
        mode = self._path.stat().st_mode & 0o777
        # The group may read it: in a pod, a Secret belongs to root and to the group fsGroup.
        if mode & 0o027:
            raise ValueError(f"{self._path} has mode {mode:03o}: others can use it; give it 600 or 640")
        names: dict[bytes, str] = {}
        lines: dict[bytes | str, int] = {}
        # Undecodable bytes become characters that no token may have.
        for number, line in enumerate(self._path.read_text("utf-8", "replace").splitlines(), start=1):
            words = line.split()
            if words and not words[0].startswith("#"):
                where = f"{self._path}, line {number}"
                name, digest = self._entry(where, words)
                for kind, key in (("name", name), ("token", digest)):
                    if lines.setdefault(key, number) != number:
                        raise ValueError(f"{where}: the {kind} of line {lines[key]}: each line needs its own")
                names[digest] = name
        log.info("auth_tokens_read", path=str(self._path), tokens=len(names))
        return names

    def _entry(self, where: str, words: list[str]) -> tuple[str, bytes]:
        # Messages quote not even the name: it may be the token, in the wrong place.
        if len(words) != 2:
            raise ValueError(f"{where}: give a name and a token; comments need lines of their own, with #")
        if len(words[1]) < MIN_TOKEN:
            raise ValueError(f"{where}: the token is too short: give at least {MIN_TOKEN} random characters")
        if not _TOKEN.fullmatch(words[1]):
            raise ValueError(f"{where}: a token has only letters, digits and -._~+/ and, at its end, =")
        return words[0], _digest(words[1])


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
