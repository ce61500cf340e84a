"""Sandboxes on a Kubernetes API: requests, retries, and what the answers mean.

The one seam to the cluster is a kubernetes_asyncio ``CustomObjectsApi`` (or anything
with its methods). Only this module knows ``ApiException``.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import random
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

import aiohttp
from kubernetes_asyncio.client.exceptions import ApiException

from .._aio.single_flight import SingleFlight
from .._aio.tasks import Pace, RequestTurns
from .._log import get_logger
from ..config import SandboxManagerConfig
from ..errors import (
    SandboxError,
    SandboxFailedError,
    SandboxPermissionError,
    SandboxUnavailableError,
)
from . import manifest
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
from .connection import OwnClient, open_custom_objects_api
from .manifest import GROUP, PLURAL, Object

REQUEST_TIMEOUT = 10.0
"""Bound on one request: kubernetes_asyncio itself has none."""
OPEN_TIMEOUT = 30.0
"""Bound on loading the configuration, which may run a credential plugin."""
WATCH_TIMEOUT = 120
"""Seconds after which the server ends a watch."""
WATCH_GRACE = 10.0
"""A watch that says nothing for this long past its timeout is cut."""
PAGE = 500
LISTS = 3
CONCURRENT_REQUESTS = 50
"""Half of the client's connection pool, which an open watch shares."""
CONNECTING_PAUSE = 0.004
"""Between two new connections, when many are needed: a TLS handshake is 0.5 ms of the loop's time."""
KEPT = 15.0
"""How long aiohttp keeps a connection that is not used."""
STEPS_PER_PASS = 4
"""Requests and connections begun in one pass of the event loop; each takes some 300 µs of it."""
STARTING_SERVER = 10.0
"""An API server that starts answers 403 to everybody for a while."""

MERGE_PATCH = "application/merge-patch+json"
"""Given a dict, kubernetes_asyncio would send a json-patch, which is a list."""

T = TypeVar("T")


class SandboxResources:
    """Sandboxes in one namespace.

    Every request is bounded. With a `deadline` (on the loop's clock) a request is
    retried until then on 429 (honouring Retry-After), 500, 502, 503, 504 and broken
    connections, with exponential backoff and jitter; without one it is tried once.
    """

    def __init__(
        self, config: SandboxManagerConfig, api: Any | None = None, events: Counter[str] | None = None
    ) -> None:
        self.events = events
        self._log = get_logger("kubernetes", events)
        self._config = config
        self._given = api
        self._open = SingleFlight("kubernetes-config", open_custom_objects_api)
        self._discover = SingleFlight("kubernetes-discovery", self._discover_version)
        self._renew = SingleFlight("kubernetes-credentials", self._renew_credentials)
        self._renewals = 0
        self._version_was_served = False
        self._assumed_until: float | None = None
        self._refused_since: dict[str, float] = {}
        self._worked: set[str] = set()
        self._away_at = -math.inf
        connects = api is None or hasattr(api, "api_client")  # else it is a stand-in, in memory
        self._requests = RequestTurns(
            CONCURRENT_REQUESTS, pause=CONNECTING_PAUSE if connects else 0.0, kept=KEPT
        )
        self.pace = Pace(STEPS_PER_PASS)
        self._accepts: dict[str, frozenset[str] | None] = {}

    async def aclose(self) -> None:
        """Closes the connection that was opened here; one that was passed in stays open."""
        await self._discover.aclose()
        await self._renew.aclose()
        opened = await self._open.aclose()
        if opened is not None:
            await opened.api_client.close()

    async def api_version(self, deadline: float | None = None) -> str:
        """The API version in use: as configured, else the newest that is served.

        Only a positive answer is kept: a server that is starting says 404 to everything.

        Raises:
            SandboxUnavailableError: The cluster cannot be reached, or serves neither
                version (the message says what to install).
        """
        if self._config.api_version != "auto":
            return self._config.api_version
        if self._assumed_until is not None and asyncio.get_running_loop().time() >= self._assumed_until:
            self._assumed_until = None
            self._discover.forget()
        try:
            return await self.retry("discover", self._discover, deadline)
        except (RetryableError, UnexpectedError) as e:
            e.ambiguous = False  # Whatever it was asked for has not been sent.
            raise

    async def _discover_version(self) -> str:
        api = await self._api()
        if not _can_discover(api):
            return "v1alpha1"
        for version in manifest.API_VERSIONS:
            try:
                served = await self._once("discover", api.get_api_resources, (GROUP, version), {})
            except (VersionGoneError, NotFoundError):
                continue
            except (SandboxPermissionError, UnsupportedError) as e:
                if e.status == 401:
                    raise
                # Not an answer to keep: a server that is starting refuses this too.
                self._assumed_until = asyncio.get_running_loop().time() + STARTING_SERVER
                return "v1alpha1"
            resources = getattr(served, "resources", None)
            if not isinstance(resources, list):  # A plain fake: it cannot say.
                return "v1alpha1"
            if any(getattr(resource, "name", None) == PLURAL for resource in resources):
                self._version_was_served = True
                return version
        message = (
            f"the API server serves no {PLURAL}.{GROUP} in {' or '.join(manifest.API_VERSIONS)}:"
            " install agent-sandbox (kubernetes-sigs/agent-sandbox) on the cluster"
        )
        if self._version_was_served:  # It was there: the server is starting.
            raise RetryableError(message, status=404)
        raise SandboxUnavailableError(message, status=404)

    async def create(self, body: Object) -> Object | None:
        """Creates a Sandbox; one request, never repeated here.

        Returns:
            The created object, or None where the API object does not return one.

        Raises:
            AlreadyExistsError: The name is taken.
            RetryableError: It may have been created (``ambiguous``), or 429.
            SandboxError: It was refused; nothing was created.
        """
        created = await self._call("create", "create_namespaced_custom_object", body)
        return created if isinstance(created, dict) and manifest.uid(created) else None

    async def get(self, name: str, deadline: float | None = None) -> Object | None:
        """Reads a Sandbox; None if there is none."""
        try:
            found = await self._call("get", "get_namespaced_custom_object", name, deadline=deadline)
        except NotFoundError:
            return None
        if not isinstance(found, dict):
            raise RetryableError(
                f"the API server answered a get of Sandbox {name} with {type(found).__name__}"
            )
        return found

    async def _pages(self, selector: str, deadline: float | None) -> tuple[list[Object], str]:
        items: list[Object] = []
        token: dict[str, str] = {}
        while True:
            page = await self._call(
                "list",
                "list_namespaced_custom_object",
                deadline=deadline,
                label_selector=selector,
                limit=PAGE,
                **token,
            )
            if not isinstance(page, dict):
                raise RetryableError(
                    f"the API server answered a list of Sandboxes with {type(page).__name__}"
                )
            items += [item for item in page.get("items") or () if manifest.matches(item, selector)]
            metadata = page.get("metadata") or {}
            if not metadata.get("continue"):
                return items, str(metadata.get("resourceVersion") or "")
            token = {"_continue": metadata["continue"]}

    async def list(self, selector: str, deadline: float | None = None) -> tuple[list[Object], str]:
        """All Sandboxes that match, page by page, and the list's resourceVersion."""
        for _ in range(LISTS):
            try:
                return await self._pages(selector, deadline)
            except ExpiredError as e:
                error = e  # A continue token lives for minutes only: begin again.
        raise error

    async def delete(
        self, name: str, uid: str | None, deadline: float | None = None, *, version: str | None = None
    ) -> bool:
        """Deletes the Sandbox that has this uid; one that is gone, or another, is fine.

        A uid of None is for API objects that give none: it deletes whatever has the name.
        With the resourceVersion of what the caller has seen, what has changed since stays.

        Returns:
            Whether there was something to delete.
        """
        # The camelCase dict is the wire's own form of V1DeleteOptions.
        wanted = {"uid": uid, "resourceVersion": version}
        body = {"preconditions": {key: value for key, value in wanted.items() if value is not None}}
        try:
            await self._call("delete", "delete_namespaced_custom_object", name, deadline=deadline, body=body)
        except (NotFoundError, PreconditionError):
            return False
        return True

    async def patch(self, name: str, body: Object, deadline: float | None = None) -> Object | None:
        """Applies a JSON merge patch (RFC 7386); metadata.uid in it is a precondition.

        Raises:
            NotFoundError, PreconditionError, UnsupportedError: As they say.
        """
        patched = await self._call(
            "patch",
            "patch_namespaced_custom_object",
            name,
            body,
            deadline=deadline,
            _content_type=MERGE_PATCH,
        )
        return patched if isinstance(patched, dict) else None

    async def watch(self, selector: str, resource_version: str) -> AsyncGenerator[tuple[str, Object], None]:
        """One watch request: yields (type, object) until the server ends it.

        The first pair is ``("OPEN", {})``: the server has accepted the request.

        Raises:
            ExpiredError: The resourceVersion is too old: list again.
            UnsupportedError: The API object cannot stream.
            SandboxError: As for the other requests.
        """
        response = await self._call(
            "watch",
            "list_namespaced_custom_object",
            label_selector=selector,
            resource_version=resource_version,
            allow_watch_bookmarks=True,
            timeout_seconds=WATCH_TIMEOUT,
            watch=True,
            _preload_content=False,
        )
        readline = getattr(getattr(response, "content", None), "readline", None)
        if not inspect.iscoroutinefunction(readline):
            raise UnsupportedError("this CustomObjectsApi does not stream: it cannot watch")
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
        except (aiohttp.ClientError, OSError, ValueError) as e:  # TimeoutError is an OSError
            raise RetryableError(f"the watch broke: {_described(e)}") from e

    def _event(self, line: bytes) -> tuple[str, Object]:
        try:
            event = json.loads(line)
            kind, found = event["type"], event["object"]
        except (ValueError, TypeError, KeyError) as e:
            # A 429 in front of the API server arrives as a line of text, not as an event.
            raise RetryableError(f"the watch said {line[:200]!r}, which is no event") from e
        if kind == "ERROR":
            raise self._translated("watch", int(found.get("code") or 500), json.dumps(found), None)
        return kind, found

    async def _call(
        self, verb: str, method: str, *args: object, deadline: float | None = None, **kwargs: object
    ) -> Any:
        async def once() -> Any:
            bound = getattr(await self._api(), method, None)
            if bound is None:
                raise UnsupportedError(f"this CustomObjectsApi has no {method}")
            version = await self.api_version()
            target = (GROUP, version, self._config.namespace, PLURAL, *args)
            try:
                return await self._once(verb, bound, target, kwargs)
            except VersionGoneError as e:
                return await self._once_more(verb, bound, target, kwargs, e)

        name = args[0] if args and isinstance(args[0], str) else None
        return await self.retry(verb, once, deadline, name)

    async def _once_more(
        self,
        verb: str,
        bound: Any,
        target: tuple[Any, ...],
        kwargs: dict[str, object],
        error: VersionGoneError,
    ) -> Any:
        """After a plain-text 404: asks for the API version again, and repeats the request once."""
        if not _can_discover(await self._api()):
            raise NotFoundError(str(error), status=404) from error.__cause__
        self._discover.forget()
        version = await self.api_version()
        if verb != "create":  # Its body is made for one version: whoever made it makes another.
            try:
                return await self._once(verb, bound, (target[0], version, *target[2:]), kwargs)
            except VersionGoneError as e:
                error = e
        text = f"{error} (does the API server serve {GROUP}/{version}? see api_version)"
        raise retryable(404, text, None, ambiguous=False) from error.__cause__

    async def retry(
        self,
        verb: str,
        once: Callable[[], Awaitable[T]],
        deadline: float | None,
        sandbox: str | None = None,
    ) -> T:
        """Repeats what fails for a reason that may pass, until the deadline."""
        loop = asyncio.get_running_loop()
        attempt = 0
        while True:
            try:
                return await once()
            except RetryableError as e:
                pause = backoff(attempt) if e.retry_after is None else e.retry_after
                attempt += 1
                if deadline is None or loop.time() + pause >= deadline:
                    raise
                name = {} if sandbox is None else {"sandbox": sandbox}
                took = round(pause, 3)
                self._log.info(
                    "request_retried", verb=verb, **name, attempt=attempt, pause=took, reason=str(e)
                )
                await asyncio.sleep(pause)

    async def _api(self) -> Any:
        if self._given is not None:
            return self._given
        try:
            async with asyncio.timeout(OPEN_TIMEOUT):
                return await self._open()
        except TimeoutError as e:
            raise SandboxUnavailableError(
                f"the Kubernetes configuration has not been loaded within {OPEN_TIMEOUT:g} s"
            ) from e

    async def _once(self, verb: str, bound: Any, args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
        """One request, and a second one with new credentials where those in use are refused."""
        renewals = self._renewals
        try:
            return await self._attempt(verb, bound, args, kwargs)
        except SandboxError as e:
            # Nothing was done: authentication comes first. (A webhook may say 401, too.)
            if e.status != 401 or isinstance(e, SandboxFailedError) or not await self._renewed(renewals):
                raise
        try:
            return await self._attempt(verb, bound, args, kwargs)
        except SandboxPermissionError as e:
            if e.status != 401:
                raise
            text = f"{e}, and so are those that were loaded after that"
            raise SandboxPermissionError(text, status=401) from e.__cause__

    async def _renewed(self, renewals: int) -> bool:
        """After a 401 to a request that began after so many renewals: whether to try once more."""
        client = getattr(await self._api(), "api_client", None)
        if not isinstance(client, OwnClient):  # It was passed in: its own hook is called for each request.
            configuration = getattr(client, "configuration", None)
            return getattr(configuration, "refresh_api_key_hook", None) is not None
        if renewals == self._renewals:
            self._renew.forget()
            await self._renew()
        return True

    async def _renew_credentials(self) -> None:
        client = (await self._api()).api_client
        try:
            async with asyncio.timeout(OPEN_TIMEOUT):
                await client.renew_credentials()
        except (SandboxUnavailableError, TimeoutError) as e:
            why = str(e) or f"not within {OPEN_TIMEOUT:g} s"
            self._log.warning("credentials_not_renewed", reason=why)
            text = f"the API server refused the credentials, and new ones could not be loaded: {why}"
            raise SandboxUnavailableError(text, status=401) from e.__cause__ or e
        self._renewals += 1
        self._log.info("credentials_renewed")

    async def _attempt(
        self, verb: str, bound: Any, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> Any:
        limit: object = REQUEST_TIMEOUT
        if verb == "watch":  # connect, then silence
            limit = (REQUEST_TIMEOUT, WATCH_TIMEOUT + WATCH_GRACE)
        kwargs = self._accepted(bound, {**kwargs, "_request_timeout": limit})
        try:
            # The wait for a turn is no part of the bound: nothing has been sent yet.
            async with self._requests:
                await self.pace()
                async with asyncio.timeout(REQUEST_TIMEOUT):
                    result = await bound(*args, **kwargs)
                    if verb == "watch":
                        await _check_stream(result)
        except (ApiException, UnicodeDecodeError) as e:
            # kubernetes_asyncio trips over a proxy's page that is no UTF-8.
            answer = e if isinstance(e, ApiException) else e.__context__
            if not isinstance(answer, ApiException):
                raise _unexpected(verb, e) from e
            error = self._translated(verb, answer.status or 0, answer.body, answer.headers)
            if isinstance(error, NotFoundError | AlreadyExistsError | PreconditionError):
                self._allowed(verb)  # A 404 or 409 proves that RBAC allowed the request.
            raise error from answer
        except SandboxError:  # The credentials could not be renewed: nothing was sent.
            raise
        except TimeoutError as e:
            self._away_at = asyncio.get_running_loop().time()  # One that starts takes connections first.
            raise RetryableError(
                f"the API server did not answer a {verb} within {REQUEST_TIMEOUT:g} s"
            ) from e
        except (aiohttp.ClientError, OSError) as e:
            self._away_at = asyncio.get_running_loop().time()
            broken = RetryableError(f"the API server cannot be reached: {_described(e)}")
            broken.ambiguous = not isinstance(e, aiohttp.ClientConnectorError)
            raise broken from e
        except Exception as e:
            raise _unexpected(verb, e) from e
        self._allowed(verb)
        return result

    def _allowed(self, verb: str) -> None:
        self._worked.add(verb)
        self._refused_since.pop(verb, None)

    def _accepted(self, bound: Any, kwargs: dict[str, object]) -> dict[str, object]:
        """Leaves out what the method's signature does not take, for plain fakes."""
        name = getattr(bound, "__name__", repr(bound))
        if name not in self._accepts:
            parameters = inspect.signature(bound).parameters.values()
            open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
            self._accepts[name] = None if open_ended else frozenset(p.name for p in parameters)
        names = self._accepts[name]
        if names is None:
            return kwargs
        if kwargs.get("watch") and "watch" not in names:
            raise UnsupportedError("this CustomObjectsApi cannot watch")
        return {key: value for key, value in kwargs.items() if key in names}

    def _translated(
        self, verb: str, code: int, body: object, headers: Mapping[str, str] | None
    ) -> SandboxError:
        error = translate(verb, self._config.namespace, code, body, headers)
        now = asyncio.get_running_loop().time()
        if isinstance(error, SandboxPermissionError) and (code == 401 or rbac_refused(verb, code, body)):
            # An API server that starts refuses everybody for a while: also what was allowed
            # before, and what nobody had asked for until it was away.
            known = code == 403 and verb in self._worked
            since = self._refused_since.setdefault(verb, now) if known else self._away_at
            if now - since < STARTING_SERVER:
                return retryable(code, str(error), None, ambiguous=False)
        return error


async def _check_stream(response: Any) -> None:
    """Asked for a stream, kubernetes_asyncio does not look at the status."""
    status = getattr(response, "status", 200)
    if status == 200:
        return
    try:
        refusal = ApiException(status=status)
        refusal.body, refusal.headers = await response.read(), response.headers
    finally:
        response.close()
    raise refusal


def _can_discover(api: object) -> bool:
    return callable(getattr(api, "get_api_resources", None))


def backoff(attempt: int, *, first: float = 0.1, most: float = 5.0) -> float:
    """Exponential backoff with jitter: half fixed, half random, so that retries spread out."""
    pause = min(most, first * 2.0 ** min(attempt, 30))
    return pause * (0.5 + random.random() / 2)


def _unexpected(verb: str, error: Exception) -> UnexpectedError:
    return UnexpectedError(f"the CustomObjectsApi failed to {verb} a Sandbox: {_described(error)}")


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
