"""Requests for the objects of sessions in one namespace: retries, and what the answers mean."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, Self, TypeVar

from .._aio.pacing import Pace
from .._aio.single_flight import SingleFlight
from .._log import Logger, get_logger
from ..config import SandboxManagerConfig
from ..errors import (
    SandboxError,
    SandboxFailedError,
    SandboxPermissionError,
    SandboxUnavailableError,
)
from . import lenient
from .api_errors import (
    AlreadyExistsError,
    ExpiredError,
    NotFoundError,
    PreconditionError,
    RetryableError,
    UnexpectedError,
    UnsupportedError,
    VersionGoneError,
    rbac_refused,
    retryable,
    translate,
)
from .claim import resource_for
from .connection import Connection
from .grace import STARTING_SERVER, StartupGrace
from .metadata import Object
from .resource import Resource

REQUEST_TIMEOUT = 10.0
"""Bound on one request: kubernetes_asyncio itself has none."""
WATCH_TIMEOUT = 120
"""Seconds after which the server ends a watch."""
WATCH_GRACE = 10.0
"""A watch that says nothing for this long past its timeout is cut."""
PAGE = 500
LISTS = 3
"""How often a list is begun again whose continue token has expired."""
CONCURRENT_REQUESTS = 50
"""Half of the client's connection pool, which an open watch shares.

Beyond the pool, requests would wait for a connection on their own time: without this limit and
that on creates, 200 sessions at once (benchmarks, kube-apiserver) open all of it, and the longest
pass of the loop is three times as long.
"""
STEPS_PER_PASS = 4
"""Requests, and steps of sessions' lives, in one pass of the event loop; a request takes some 300 µs.

Without it, the benchmarks' longest pass with 200 sessions at once, in memory, is half as long again.
"""

MERGE_PATCH = "application/merge-patch+json"
"""Given a dict, kubernetes_asyncio would send a json-patch, which is a list."""

METHODS = {
    "create": "create_namespaced_custom_object",
    "get": "get_namespaced_custom_object",
    "list": "list_namespaced_custom_object",
    "watch": "list_namespaced_custom_object",
    "patch": "patch_namespaced_custom_object",
    "patch_status": "patch_namespaced_custom_object_status",
    "delete": "delete_namespaced_custom_object",
    "discover": "get_api_resources",
}
SERVED = "serve"
"""Stands for a verb that has worked: discovery has found an API version."""

Args = tuple[object, ...]
Options = Mapping[str, object]
T = TypeVar("T")


class SandboxResources:
    """The objects of one kind in one namespace.

    Every request is bounded. With a `deadline` (on the loop's clock) a request is
    retried until then on 429 (honouring Retry-After), 500, 502, 503, 504 and broken
    connections, with exponential backoff and jitter; without one it is tried once.

    Args:
        config: Namespace and API version.
        api: A CustomObjectsApi, which is never closed here; None: `open_api` opens one.
        events: Counts what is logged.
        resource: The kind; None: that of the manager's sessions.
        open_api: Opens the connection on first use; None: `open_custom_objects_api`.
        page: How many objects are asked for in one request of a list.
    """

    def __init__(
        self,
        config: SandboxManagerConfig,
        api: Any | None = None,
        events: Counter[str] | None = None,
        *,
        resource: Resource | None = None,
        open_api: Callable[[], Awaitable[Any]] | None = None,
        page: int | None = None,
    ) -> None:
        self.events = events
        self.resource = resource or resource_for(config)
        self.connection = Connection(api, open_api, events)
        self.pace = Pace(STEPS_PER_PASS)
        self._log = get_logger("kubernetes", events)
        self._config = config
        self._page = page
        self._discover = SingleFlight("kubernetes-discovery", self._discover_version)
        self._discoveries = [self._discover]
        self._grace = StartupGrace()
        self._turns = asyncio.Semaphore(CONCURRENT_REQUESTS)

    def of(self, resource: Resource) -> Self:
        """The objects of another kind in the same namespace, by the same connection."""
        other = copy.copy(self)
        other.resource, other._grace = resource, StartupGrace()
        other._discover = SingleFlight(f"kubernetes-discovery-{resource.plural}", other._discover_version)
        self._discoveries.append(other._discover)  # For `aclose`, which only this one needs.
        return other

    async def aclose(self) -> None:
        for discovery in self._discoveries:
            await discovery.aclose()
        await self.connection.aclose()

    # The API version

    async def api_version(self, deadline: float | None = None) -> str:
        """As configured, else the newest that is served.

        `SandboxUnavailableError`: the cluster cannot be reached, or serves none; it says what to install.
        """
        if self._config.api_version != "auto":
            return self._config.api_version
        try:
            version, until = await self.retry("discover", self._discover, deadline)
        except (RetryableError, UnexpectedError) as e:
            e.ambiguous = False  # The request that needs the version has not been sent.
            raise
        if asyncio.get_running_loop().time() < until:
            return version
        self._discover.forget()
        return await self.api_version(deadline)

    async def _discover_version(self) -> tuple[str, float]:
        """The version to use, and until when: only a positive answer counts for good."""
        api, resource = await self.connection.api(), self.resource
        if not api.can_discover:
            return resource.versions[-1], math.inf
        for version in resource.versions:
            try:
                answer = await self._authenticated("discover", (resource.group, version), {})
            except (VersionGoneError, NotFoundError):
                continue
            except (SandboxPermissionError, UnsupportedError) as e:
                if e.status == 401:
                    raise
                # A server that is starting refuses discovery, too.
                return resource.versions[-1], asyncio.get_running_loop().time() + STARTING_SERVER
            plurals = lenient.served(answer)
            if plurals is None:
                return resource.versions[-1], math.inf
            if resource.plural in plurals:
                self._grace.worked(SERVED)
                return version, math.inf
        message = (
            f"the API server serves no {resource.plural}.{resource.group} in"
            f" {' or '.join(resource.versions)}:"
            f" install {resource.release} on the cluster"
        )
        if self._grace.has_worked(SERVED):  # A server that is starting does not serve it yet.
            raise RetryableError(message, status=404)
        raise SandboxUnavailableError(message, status=404)

    # The verbs

    async def create(self, body: Object) -> Object | None:
        """Creates an object; one request, never repeated here. None where the API returns no object.

        Raises:
            AlreadyExistsError: The name is taken.
            RetryableError: It may have been created (``ambiguous``), or 429.
            SandboxError: It was refused; nothing was created.
        """
        return lenient.created(await self._request("create", body))

    async def get(self, name: str, deadline: float | None = None) -> Object | None:
        try:
            found = await self._request("get", name, deadline=deadline)
        except NotFoundError:
            return None
        return self._object(f"get of {self.resource.kind} {name}", found)

    async def _pages(self, selector: str, deadline: float | None) -> tuple[list[Object], str]:
        items: list[Object] = []
        options: dict[str, object] = {"label_selector": selector, "limit": self._page or PAGE}
        while True:
            answer = await self._request("list", deadline=deadline, **options)
            found, version, token = lenient.page(
                self._object(f"list of {self.resource.plural}", answer), selector
            )
            items += found
            if token is None:
                return items, version
            options["_continue"] = token

    async def list(self, selector: str, deadline: float | None = None) -> tuple[list[Object], str]:
        """All objects that match, page by page, and the list's resourceVersion."""
        for _ in range(LISTS):
            try:
                return await self._pages(selector, deadline)
            except ExpiredError as e:  # A continue token lives for minutes only.
                error = e
        raise error

    async def delete(
        self, name: str, uid: str | None, deadline: float | None = None, *, version: str | None = None
    ) -> bool:
        """Deletes the object that has this uid, unless it has changed since `version`; tells whether it did.

        A uid of None is for API objects that give none: it deletes whatever has the name. One that is gone,
        or another, is fine.
        """
        # The camelCase dict is the wire's own form of V1DeleteOptions.
        wanted = {"uid": uid, "resourceVersion": version}
        body = {"preconditions": {key: value for key, value in wanted.items() if value is not None}}
        try:
            await self._request("delete", name, deadline=deadline, body=body)
        except (NotFoundError, PreconditionError):
            return False
        return True

    async def patch(
        self, name: str, body: Object, deadline: float | None = None, *, status: bool = False
    ) -> Object | None:
        """Applies a JSON merge patch (RFC 7386); metadata.uid in it is a precondition.

        With `status` it goes to that subresource, as a controller's does.
        """
        verb = "patch_status" if status else "patch"
        patched = await self._request(verb, name, body, deadline=deadline, _content_type=MERGE_PATCH)
        return patched if isinstance(patched, dict) else None

    async def watch(self, selector: str, resource_version: str) -> AsyncGenerator[tuple[str, Object], None]:
        """One watch request: yields (type, object) until the server ends it.

        The first pair is ``("OPEN", {})``: the server has accepted the request. `ExpiredError`: list again;
        `UnsupportedError`: the API object cannot stream.
        """
        response = await self._request(
            "watch",
            label_selector=selector,
            resource_version=resource_version,
            allow_watch_bookmarks=True,
            timeout_seconds=WATCH_TIMEOUT,
            watch=True,
            _preload_content=False,
        )
        readline = lenient.line_reader(response)
        try:
            yield "OPEN", {}
            while line := await self._read(readline):
                yield self._event(line)
        finally:
            # close() drops the connection; release() would wait for the stream's end.
            response.close()

    async def _read(self, readline: Callable[[], Awaitable[bytes]]) -> bytes:
        try:
            async with asyncio.timeout(WATCH_TIMEOUT + WATCH_GRACE):
                return await readline()
        except _broken("ClientError", OSError, ValueError) as e:  # TimeoutError is an OSError
            self._grace.unreachable()  # The next request may meet a server that is starting.
            raise RetryableError(f"the watch broke: {_described(e)}") from e

    def _event(self, line: bytes) -> tuple[str, Object]:
        try:
            event = json.loads(line)
            kind, found = event["type"], event["object"]
        except (ValueError, TypeError, KeyError) as e:
            # A 429 in front of the API server arrives as a line of text, not as an event.
            raise RetryableError(f"the watch said {line[:200]!r}, which is no event") from e
        if kind == "ERROR":
            raise self._refusal("watch", int(found.get("code") or 500), json.dumps(found), None)
        return kind, found

    def _object(self, what: str, answer: object) -> Object:
        if isinstance(answer, dict):
            return answer
        raise RetryableError(f"the API server answered a {what} with {type(answer).__name__}")

    # The path of a request: retried, in the API version that is served, with credentials that count

    async def _request(
        self, verb: str, *args: object, deadline: float | None = None, **options: object
    ) -> Any:
        name = args[0] if args and isinstance(args[0], str) else None
        return await self.retry(verb, lambda: self._versioned(verb, args, options), deadline, name)

    async def retry(
        self,
        verb: str,
        once: Callable[[], Awaitable[T]],
        deadline: float | None,
        sandbox: str | None = None,
    ) -> T:
        """Repeats what fails for a reason that may pass, until the deadline."""
        attempt = 0
        while True:
            try:
                return await once()
            except RetryableError as e:
                await wait_to_retry(self._log, e, verb, attempt, deadline, sandbox)
                attempt += 1

    async def _versioned(self, verb: str, args: Args, options: Options) -> Any:
        """A request; if its API version is not served, discovers again and repeats it once."""
        group, namespace, plural = self.resource.group, self._config.namespace, self.resource.plural
        version = await self.api_version()
        try:
            return await self._authenticated(verb, (group, version, namespace, plural, *args), options)
        except VersionGoneError as e:
            gone = e
        if not (await self.connection.api()).can_discover:
            raise NotFoundError(str(gone), status=404) from gone.__cause__
        self._discover.forget()
        version = await self.api_version()
        if verb != "create":  # Its body is made for one version, by the caller.
            try:
                return await self._authenticated(verb, (group, version, namespace, plural, *args), options)
            except VersionGoneError as e:
                gone = e
        text = f"{gone} (does the API server serve {group}/{version}? see api_version)"
        raise retryable(404, text, None, ambiguous=False) from gone.__cause__

    async def _authenticated(self, verb: str, args: Args, options: Options) -> Any:
        """A request; if its credentials are refused, loads new ones and repeats it once."""
        renewals = self.connection.renewals
        try:
            return await self._attempt(verb, args, options)
        except SandboxError as e:
            # Authentication comes first: nothing was done. (A webhook may say 401, too.)
            if e.status != 401 or isinstance(e, SandboxFailedError):
                raise
            if not await self.connection.renew(renewals):
                raise
        try:
            return await self._attempt(verb, args, options)
        except SandboxPermissionError as e:
            if e.status != 401:
                raise
            text = f"{e}, and so are those that were loaded after that"
            raise SandboxPermissionError(text, status=401) from e.__cause__

    async def _attempt(self, verb: str, args: Args, options: Options) -> Any:
        """One request: its turn, its time limit, and its failure as the library's own error."""
        api = await self.connection.api()
        limit: object = REQUEST_TIMEOUT
        if verb == "watch":  # to connect, and between two lines
            limit = (REQUEST_TIMEOUT, WATCH_TIMEOUT + WATCH_GRACE)
        rbac_verb = verb.removesuffix("_status")
        try:
            # The wait for a turn is no part of the bound: nothing has been sent yet.
            async with self._turns:
                await self.pace()
                async with asyncio.timeout(REQUEST_TIMEOUT):
                    answer = await api.call(METHODS[verb], *args, **options, _request_timeout=limit)
                    if verb == "watch":
                        await _check_stream(answer)
        except SandboxError:  # Nothing was sent: no such method, or credentials that expired.
            raise
        except Exception as e:  # noqa: BLE001 - whatever it is, it is translated
            raise self._failure(rbac_verb, e) from _answer(e) or e
        self._grace.worked(rbac_verb)
        return answer

    def _failure(self, verb: str, error: Exception) -> SandboxError:
        """What an exception of the API object's means."""
        answer = _answer(error)
        if answer is not None:
            refusal = self._refusal(verb, answer.status or 0, answer.body, answer.headers)
            if isinstance(refusal, NotFoundError | AlreadyExistsError | PreconditionError):
                self._grace.worked(verb)  # A 404 or 409 proves that RBAC allowed the request.
            return refusal
        if not isinstance(error, _broken("ClientError", OSError)):
            kind = self.resource.kind
            return UnexpectedError(f"the CustomObjectsApi failed to {verb} a {kind}: {_described(error)}")
        self._grace.unreachable()
        if isinstance(error, TimeoutError):
            return RetryableError(f"the API server did not answer a {verb} within {REQUEST_TIMEOUT:g} s")
        broken = RetryableError(f"the API server cannot be reached: {_described(error)}")
        broken.ambiguous = not isinstance(error, _broken("ClientConnectorError"))
        return broken

    def _refusal(self, verb: str, code: int, body: object, headers: Mapping[str, str] | None) -> SandboxError:
        error = translate(verb, self._config.namespace, code, body, headers, self.resource)
        doubtful = code == 401 or rbac_refused(verb, code, body)
        if isinstance(error, SandboxPermissionError) and doubtful and self._grace.may_pass(verb, code):
            return retryable(code, str(error), None, ambiguous=False)
        return error


async def wait_to_retry(
    log: Logger, error: RetryableError, verb: str, attempt: int, deadline: float | None, sandbox: str | None
) -> None:
    """Waits after a failure that may pass; raises it again if there is no time for another try.

    Args:
        log: Tells of it.
        error: The failure.
        verb: Of the request.
        attempt: How many tries have failed before this one.
        deadline: On the loop's clock; None: there is no other try.
        sandbox: Name of the object, if the request is about one.
    """
    pause = error.pause(attempt)
    if deadline is None or asyncio.get_running_loop().time() + pause >= deadline:
        raise error
    name = {} if sandbox is None else {"sandbox": sandbox}
    log.info(
        "request_retried", verb=verb, **name, attempt=attempt + 1, pause=round(pause, 3), reason=str(error)
    )
    await asyncio.sleep(pause)


async def _check_stream(response: Any) -> None:
    """Asked for a stream, kubernetes_asyncio does not look at the status."""
    status = getattr(response, "status", 200)
    if status == 200:
        return
    try:
        # Here, since it takes half a second to import: clusters in memory never need it.
        from kubernetes_asyncio.client.exceptions import ApiException

        refusal = ApiException(status=status)
        refusal.body, refusal.headers = await response.read(), response.headers
    finally:
        response.close()
    raise refusal


def _answer(error: Exception) -> Any | None:
    """The HTTP answer behind an exception; kubernetes_asyncio trips over a page that is no UTF-8."""
    answer = error.__context__ if isinstance(error, UnicodeDecodeError) else error
    # Not by their class, which takes half a second to import: a fake may have others like it.
    return answer if hasattr(answer, "status") and hasattr(answer, "body") else None


def _broken(name: str, *others: type[Exception]) -> tuple[type[Exception], ...]:
    """A class of aiohttp's errors, and others; where aiohttp is not loaded, it has raised nothing."""
    library = sys.modules.get("aiohttp")
    return others if library is None else (getattr(library, name), *others)


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
