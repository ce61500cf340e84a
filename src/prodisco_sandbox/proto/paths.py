"""Paths of files in a workspace, as both sides of the protocol check them."""

from __future__ import annotations

LONGEST: int = 4000
"""Bytes of a path: the kernel takes 4,095."""


def names_of(path: str) -> list[str]:
    """The names that a path consists of; none for the workspace itself.

    Raises:
        ValueError: It is none of a workspace; the message says why.
    """
    names = [name for name in path.split("/") if name not in ("", ".")]
    if path.startswith("/"):
        problem = "it is absolute"
    elif ".." in names:
        problem = 'it has a ".."'
    elif "\0" in path:
        problem = "it has a null character"
    elif len(path.encode("utf-8", "surrogatepass")) > LONGEST:
        problem = f"it is longer than {LONGEST:,} bytes"
    elif not _is_unicode(path):
        problem = "it cannot be encoded as UTF-8"
    else:
        return names
    shown = path if len(path) <= 100 else f"{path[:100]}…"
    raise ValueError(f"path is {shown!r}: {problem}; it must be relative to the workspace")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
