"""The gRPC metadata of the protocol: which machine a call means, and which one answers."""

from __future__ import annotations

from typing import Final

BOOT_ID: Final = "prodisco-boot-id"
"""In the initial and the trailing metadata of every answer: drawn anew whenever a server starts to serve."""
POD_NAME: Final = "prodisco-pod-name"
"""Likewise, from a server that was told its pod's name."""
FEATURES: Final = "prodisco-features"
"""Likewise: what the server can beyond the protocol's messages, separated by commas."""
QUEUE: Final = "queue"
"""The feature of a server that sends the initial metadata of a call that waits for code (Execute,
ExecuteStream, ExecuteTest, and GetExecution with ``wait``) when the code begins: until then it is
queued."""
FIRST: Final = "first"
"""The feature of a server that says `FIRST_CALL`."""
FIRST_CALL: Final = "prodisco-first-call"
"""With the boot id, in the answer to the first call that a server takes since its start, health checks
aside: nothing that the caller may have left is on this machine."""
FILES: Final = "files"
"""The feature of a server that has the FileService of files.proto."""

TOKEN: Final = "prodisco-token"  # noqa: S105
"""In a request: the token of a server that demands one; without it, every call is UNAUTHENTICATED."""
EXPECT_POD: Final = "prodisco-expect-pod"
"""In a request: the name of the pod that it is meant for."""
EXPECT_BOOT: Final = "prodisco-expect-boot"
"""In a request: the boot id that it is meant for."""

FENCE: Final = "prodisco-fence"
"""In the trailing metadata of a refusal (FAILED_PRECONDITION): the expectation that was not met,
``pod`` or ``boot``. Nothing has run."""
