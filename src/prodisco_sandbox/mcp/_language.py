"""The languages that sandboxes run, as the model is told about them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Language:
    """A language, and the properties of servers that run it."""

    name: str
    """The name that the model sees."""
    tags: frozenset[str]
    """The marks of Markdown fences around its code."""
    has_files: bool = True
    """Whether a sandbox keeps files between executions."""
    state: str
    """A sentence for the tool's description about state between executions."""
    tests: str
    """How tests are written."""


_PYTHON = (
    "Each execution is a new process: variables and imports do not stay. Files in the working directory do,"
    " as long as the sandbox lives."
)
_PYTHON_TESTS = "`tests` are functions named test_*, with plain assert; what `code` defines is there."
# The stock server: every script runs in a VM context within the server's own Node.js process.
_NODE = (
    "Each execution is the body of an async function in one VM inside the server: top-level `await` works,"
    " `import` does not, and `require` only loads modules that the server allows. There are no files and no"
    " processes, and variables do not stay: print results with console.log. A loop that never awaits blocks"
    " the whole sandbox."
)
_NODE_TESTS = (
    '`tests` call test("name", fn), and check with the global `assert`; neither is imported; what `code`'
    " defines is there."
)
_OTHER = "Print what you need: whether variables and files stay between executions depends on the server."

_KNOWN = {
    "python": (frozenset({"py", "python"}), True, _PYTHON, _PYTHON_TESTS),
    "typescript": (
        frozenset({"ts", "typescript", "js", "javascript", "mts", "mjs"}),
        False,
        _NODE,
        _NODE_TESTS,
    ),
    "javascript": (frozenset({"js", "javascript", "mjs", "cjs"}), False, _NODE, _NODE_TESTS),
}


def language_of(name: str) -> Language:
    """Looks a language up by the first word of its name, such as "Python 3.12"."""
    first = (name.lower().split() or [""])[0].strip(",;:()")
    tags, has_files, state, tests = _KNOWN.get(first, (frozenset({first}), True, _OTHER, ""))
    return Language(name=name, tags=tags, has_files=has_files, state=state, tests=tests)
