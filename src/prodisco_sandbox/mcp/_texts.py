"""Texts for the model: what happened, and what to do next.

Details of the cluster go to the log: callers of the tool need not know them.
"""

from __future__ import annotations

from ..errors import (
    SandboxCapacityError,
    SandboxError,
    SandboxFailedError,
    SandboxManagerClosedError,
    SandboxPermissionError,
    SandboxReplacedError,
    SandboxTimeoutError,
    SandboxUnavailableError,
)
from ._language import Language

UNKNOWN_HANDLE = (
    "There is no sandbox with this handle: it is mistyped, not yours, or from before the server was"
    " restarted. Check that you passed it on exactly as you got it. Else call again with sandbox 'new' to"
    " get an empty one; files of the old one are gone."
)
HANDLE_NEEDED = (
    "This mode needs `sandbox`: the handle from the result of the call that made the sandbox or started the"
    " execution."
)
SHARED = "This sandbox cannot be closed: others use it too."
REPLACED = (
    "This is a new sandbox: the one of your last call was closed (after some time without use) or failed."
    " Its files, cached scripts and executions are gone; make again what you need."
)
RESTARTED = (
    "The sandbox was restarted: since your last call it was suspended (after some time without use) or"
    " failed. Files in the working directory were kept; other files, processes, cached scripts and"
    " executions were not: make again what you need."
)
MAYBE_REPLACED = (
    "The server was restarted since your last call, or that is long ago: this may be a new, empty sandbox."
    " Check which of your files are there before you rely on them."
)
EVICTED = "while you did not use it, others needed its place"
BLOCKED = "Execution blocked"
"""How the stock server's refusal to show a value of its environment begins."""
DROPPED = "The connection was lost, so the call was ended."
DRAINING = "The server is shutting down. Nothing was run. Call again in a minute."
READ_FILE = (
    "Reads a file of the sandbox in which run_sandbox runs code. A picture comes as an image, text as text"
    " (where it is long, its beginning), another file as an embedded resource. What is larger than that is to"
    " be read in parts, with run_sandbox."
)
WRITE_FILE = (
    "Writes a file into the sandbox in which run_sandbox runs code, for example data for it. Directories are"
    " made, and a file of that name is replaced. Give `text`, or `base64` for what is no text. If the result"
    " has a `sandbox` handle, pass that to run_sandbox."
)
LIST_FILES = (
    "Lists a directory of the sandbox in which run_sandbox runs code, without what is in the directories"
    " below it."
)
FILE_RESOURCE = "A file of a sandbox, by the uri that a result of run_sandbox gives."
NO_SUCH_FILE = "There is no such file or directory. list_files shows what there is."
NO_FILES = "This sandbox has no tools for files. Read and write them with code."


def text_is_cut(characters: int) -> str:
    return f"The text is cut after {characters:,} characters. Read the rest with run_sandbox, in parts."


def too_large_to_read(size: int, most: int) -> str:
    return (
        f"The file has {size:,} bytes, and is no text: at most {most:,} can be read. Look at it with"
        " run_sandbox, or make it smaller there."
    )


def listing_is_cut(count: int) -> str:
    return f"Only {count} of its entries are listed; there are more. Look for what you need with run_sandbox."


def more_files(count: int) -> str:
    return f"Only {count} of the files that this run made or changed are named."


def pictures_left_out(count: int) -> str:
    return f"{count} more pictures are too many or too large to be shown: make fewer and smaller ones."


def file_refused(reason: str) -> str:
    return f"The sandbox refused the call: {reason}."


def unknown_handle(language: Language) -> str:
    """A handle is not one of this caller's."""
    return UNKNOWN_HANDLE if language.has_files else UNKNOWN_HANDLE.partition("; files of")[0] + "."


def replaced(language: Language, *, evicted: bool = False) -> str:
    """The sandbox is not the one of the last call."""
    text = REPLACED if language.has_files else REPLACED.replace("files, cached", "cached")
    return text.replace("(after some time without use) or failed", f"({EVICTED})") if evicted else text


def restarted(language: Language, *, evicted: bool = False) -> str:
    """The sandbox is that of the last call, with its files, but on another machine."""
    text = RESTARTED
    if not language.has_files:
        text = RESTARTED.partition(" Files")[0] + " Cached scripts and executions are gone."
    return text.replace("(after some time without use) or failed", f"({EVICTED})") if evicted else text


def closed(language: Language) -> str:
    """The caller's sandbox was ended as it asked."""
    return "The sandbox is closed" + (", and its files are gone." if language.has_files else ".")


def maybe_replaced(language: Language) -> str:
    """The sandbox may not be the one of the last call."""
    if language.has_files:
        return MAYBE_REPLACED
    return MAYBE_REPLACED.partition(" Check")[0] + " Do not rely on cached scripts and executions."


def description(
    language: Language, idle: float, kept_for: float | None = None, evict_after: float | None = None
) -> str:
    """The tool's description.

    Args:
        language: That of the sandboxes.
        idle: Seconds without use after which a sandbox ends.
        kept_for: Seconds for which its files are kept then; None: they are not.
        evict_after: Seconds without use after which it may end for others; None: it does not.
    """
    end, files = "closed", ", and its files are gone then"
    if kept_for is not None:
        end = "suspended"
        files = f": files in the working directory are kept for {duration(kept_for)} then, nothing else is"
    files = files if language.has_files else ""
    sooner = "" if evict_after is None else f", or {duration(evict_after)} if others need its place"
    tests = f" {language.tests}" if language.tests else ""
    return f"""\
Runs {language.name} code in a sandbox, which nobody else uses.

Modes:
- execute: run `code` (or a `cached` script) and return its output.
- stream: the same, with standard output and standard error apart.
- async: start it and return an `execution_id` at once.
- status: state and output of an execution; with `wait`, once it has ended.
- cancel: stop an execution.
- list: executions that run, or ran lately.
- test: run `tests` against `code`.{tests}
- close: end the sandbox; do so when you need it no more.

{language.state} Only what is printed comes back, and there is no input.

The sandbox is {end} after {duration(idle)} without use{sooner}{files}.

If a result has a `sandbox` handle, pass that in every further call: without it, a call gets another \
one. If a result has a `note`, act on it."""


def too_many(limit: int, idle: float) -> str:
    return (
        f"You have {limit} sandboxes, as many as one caller may. Nothing was run. Go on in one of them by"
        f" passing its handle as `sandbox`; one that has not been used for {duration(idle)} does not count."
    )


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:g} seconds"
    if seconds < 7200:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.0f} hours"


def timed_out(milliseconds: int, longest_ms: int, language: Language) -> str:
    files = " Files that it had written are there." if language.has_files else ""
    text = (
        f"The code was stopped: it ran longer than {milliseconds:,} ms.{files} Do the work in smaller steps"
    )
    if milliseconds < longest_ms:
        text += f", or give it more time with `timeout_ms` (at most {longest_ms:,})"
    return text + "."


def no_sandbox(error: SandboxError) -> str:
    """Why the call got no sandbox."""
    if isinstance(error, SandboxManagerClosedError):
        return DRAINING
    if isinstance(error, SandboxCapacityError):
        return (
            "All sandboxes are taken. Nothing was run. If you have the handle of a sandbox, go on in that one"
            " by passing it as `sandbox`. Otherwise try again in a minute or later."
        )
    if isinstance(error, SandboxTimeoutError):
        return (
            "The sandbox was not ready in time. Nothing was run. Try again once; if that fails too, tell the"
            " user that sandboxes do not start."
        )
    if isinstance(error, SandboxUnavailableError):
        return "Sandboxes cannot be reached at present. Nothing was run. Try again in a minute."
    if isinstance(error, SandboxPermissionError | SandboxFailedError):
        return (
            "The sandbox could not be started, and trying again will hardly help. Nothing was run. Tell the"
            " user that the sandbox server's operator has to look into its log."
        )
    return "No sandbox could be made. Nothing was run. Try again once."


def failed_call(error: SandboxError, mode: str, language: Language) -> str:
    """Why a sandbox did not do what it was asked to."""
    _, blocked, rest_of_it = str(error).partition(BLOCKED)
    if blocked:
        return f"The sandbox refused the call: {blocked}{rest_of_it}"
    if error.status == "NOT_FOUND":
        return (
            "The sandbox has no execution with that `execution_id`: it ended too long ago, or the sandbox was"
            " replaced. Mode 'list' shows which ones there are."
        )
    if error.status == "UNIMPLEMENTED":
        return f"This sandbox does not offer the mode {mode!r}. Use another one."
    if error.status == "INVALID_ARGUMENT":
        return f"The sandbox refused the call: {str(error).partition('INVALID_ARGUMENT: ')[2]}"
    if isinstance(error, SandboxCapacityError):
        return (
            "The sandbox is busy: too many executions run or wait in it. Nothing was run. Wait for one to end"
            " (mode 'list' shows them), or cancel one."
        )
    if error.status == "RESOURCE_EXHAUSTED":
        if "nothing was run" in str(error):
            limit = str(error).partition("size limit of ")[2].partition(" MiB")[0]
            return (
                f"The call is too large for the sandbox, which takes messages of at most {limit} MiB. Nothing"
                " was run. Pass less code and data in one call."
            )
        return "The result is too large to be sent; how far the code came is unknown. Print less."
    if isinstance(error, SandboxTimeoutError):
        files = " Look at the files before you run it again." if language.has_files else ""
        return f"The sandbox gave no answer in time; how far the code came is unknown.{files}"
    if isinstance(error, SandboxReplacedError) and not error.ran:
        return "The sandbox was replaced. Nothing was run. Call again."
    if isinstance(error, SandboxUnavailableError | SandboxReplacedError):
        return (
            "The sandbox was lost during the call; how far the code came is unknown. Call again: if there had"
            " to be a new sandbox, the result says so"
            + (", and the files are gone." if language.has_files else ".")
        )
    return "The call failed in an unexpected way; how far the code came is unknown. Try again once."


def rest(left_out: int, execution_id: str, offset: int, error_offset: int, language: Language) -> str:
    """How to get the rest of an output that was cut."""
    if not execution_id:
        return f"The output is cut: {left_out:,} more characters are lost. Print less."
    return (
        f"The output is cut: {left_out:,} more characters are left out. To go on reading, soon: mode"
        f" 'status', execution_id {execution_id!r}, output_offset {offset},"
        f" error_output_offset {error_offset}. Better {less(language)}."
    )


def less(language: Language) -> str:
    """How to avoid too much output."""
    if language.has_files:
        return "print less, or write to a file and print parts of it"
    return "print less, or in several calls"


def lost(language: Language) -> str:
    """There is nothing at an offset, since the server does not keep the output."""
    return (
        "The rest of the output is lost: this sandbox does not keep the output of an execution that was"
        f" returned as it came. Run it again, and {less(language)}."
    )


def beyond(offset: int, length: int, error_offset: int, error_length: int) -> str:
    """An offset is greater than the length of the output."""
    return (
        f"There is nothing there: `output` has {length:,} characters, output_offset is {offset:,};"
        f" `error_output` has {error_length:,}, error_output_offset is {error_offset:,}."
    )
