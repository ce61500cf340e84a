"""What the model has to know about the language that the sandboxes run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Language:
    """A language, and what a server of it is like."""

    name: str
    """As the model is told."""
    tags: frozenset[str]
    """What Markdown fences around its code are marked with."""
    has_files: bool = True
    """Whether a sandbox keeps files between executions."""
    state: str
    """What stays between executions, for the tool's description."""
    tests: str
    """How tests are written."""


_PYTHON = (
    "Each execution is a new process: variables and imports do not stay. Files in the working directory do,"
    " as long as the sandbox lives."
)
_PYTHON_TESTS = "`tests` are functions named test_*, with plain assert; what `code` defines is there."
# The stock server's: every script runs in a VM context within the server's own Node.js process.
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
    """What is known about a language, by the first word of its name, such as "Python 3.12"."""
    first = (name.lower().split() or [""])[0].strip(",;:()")
    tags, has_files, state, tests = _KNOWN.get(first, (frozenset({first}), True, _OTHER, ""))
    return Language(name=name, tags=tags, has_files=has_files, state=state, tests=tests)
