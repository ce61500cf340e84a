"""The errors that this library raises."""

from __future__ import annotations

import copy
from typing import Self

_PAGE = "docs/troubleshooting.md"
"""Of prodisco-sandbox's documentation: it has a section for each class."""


class SandboxError(Exception):
    """Base of all errors of this library.

    ::

        SandboxError
        ├── SandboxManagerClosedError   the manager has been shut down
        ├── SandboxCapacityError        no slot: max_sessions, a quota, a full server
        ├── SandboxTimeoutError         not ready, or no answer, in time; also a TimeoutError
        ├── SandboxFailedError          will never be ready: a terminal reason
        ├── SandboxConflictError        the name is taken by somebody else's Sandbox
        ├── SandboxUnavailableError     cluster or sandbox cannot be reached
        ├── SandboxReplacedError        another machine answers in the sandbox's place
        └── SandboxPermissionError      401 or 403: the credentials do not suffice

    Where an error has a cause (an answer of the API server, a gRPC status, a broken
    connection), the cause is chained as ``__cause__``. A note below the traceback names
    the class's section of the documentation; ``str(error)`` is the message alone.

    Attributes:
        status: What the other side said: an HTTP status code of the Kubernetes API
            (``409``) or the name of a gRPC status (``"NOT_FOUND"``); None where
            nothing was said.
    """

    def __init__(self, message: str, *, status: int | str | None = None) -> None:
        super().__init__(message)
        self.status = status
        public = next(kind for kind in type(self).__mro__ if kind.__module__ == __name__)
        self.add_note(f"What to do: {_PAGE}#{public.__name__.lower()} of prodisco-sandbox")

    def copy_for_waiter(self) -> Self:
        """Returns a copy with the same cause, for one more waiter to raise.

        An exception object that several tasks raise grows a traceback out of all of
        them, so each waiter gets one of its own.
        """
        copied = copy.copy(self)
        copied.__cause__ = self.__cause__
        return copied

    def __reduce__(self) -> tuple[object, ...]:
        # Notes of its own: what is added to a copy is not added to the original.
        return (type(self), (str(self),), {**self.__dict__, "__notes__": [*self.__notes__]})


class SandboxManagerClosedError(SandboxError):
    """The manager has been shut down; it never opens again."""


class SandboxCapacityError(SandboxError):
    """There is no room: the message names the cap and the setting that raises it."""


class SandboxTimeoutError(SandboxError, TimeoutError):
    """Something did not happen in time; the message holds the last state seen."""


class SandboxFailedError(SandboxError):
    """The sandbox will never be ready; the message holds the terminal reason."""


class SandboxConflictError(SandboxError):
    """The name is taken by a Sandbox that is not this session's."""


class SandboxUnavailableError(SandboxError):
    """The cluster or the sandbox cannot be reached at present."""


class SandboxReplacedError(SandboxError):
    """The machine behind the client was replaced: its state is gone, and the client is of no more use.

    The manager's next client of the session leads to the new machine.

    Attributes:
        ran: Whether the call ran on the other machine. False: it was refused before
            anything ran, so it can be repeated; True only where that machine's server has
            no fences.
    """

    def __init__(self, message: str, *, status: int | str | None = None, ran: bool = False) -> None:
        super().__init__(message, status=status)
        self.ran = ran


class SandboxPermissionError(SandboxError):
    """The credentials do not suffice; the message names the verb and the resource."""
