"""An API server for agent-sandbox's kinds, in memory."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable
from typing import Any

from .._cluster.metadata import Object
from . import _status
from ._arguments import (
    COMMON,
    DELETE,
    LIST,
    PATCH,
    WRITE,
    Call,
    check_arguments,
    dry,
    name_in,
    number,
    parsed,
    resources,
    revision,
    timeouts,
)
from ._cluster import FakeCluster
from ._faults import Request
from ._kinds import KINDS, SANDBOX, Kind
from ._libraries import api_exceptions
from ._patches import content_type
from ._selectors import selector
from ._store import Store, copied, plain, shown
from ._watch import Response, Watch

WATCH_SECONDS = 1800.0
"""How long a watch without timeoutSeconds lasts; the API server takes 30 to 60 minutes."""

_NAMES = frozenset(of.kind for of in KINDS)
_RBAC = {"patch_status": "patch", "replace": "update", "replace_status": "update"}


class FakeCustomObjectsApi(FakeCluster):
    """`kubernetes_asyncio.client.CustomObjectsApi` for agent-sandbox's kinds, in memory, for tests::

        async def test_a_lost_answer_makes_no_second_sandbox() -> None:
            async with FakeSandboxServer() as server, FakeCustomObjectsApi(auto_ready=True) as api:
                api.faults.add("create", lost=True, times=1)
                config = SandboxManagerConfig(mode="multi", endpoint=lambda sandbox: server.target)
                async with SandboxManager(config, custom_objects_api=api) as manager:
                    await manager.get_client("session")
                    assert len(api.objects) == 1
                assert not api.objects
                assert not api.watches

    Methods, answers and refusals are those of a real API server with the Sandbox
    definition installed: resourceVersions, generation, finalizers, the status
    subresource, selectors, limit and continue, watches with bookmarks, Status bodies. It
    keeps to JSON merge and JSON patches, has no managed fields, does not prune unknown
    fields, and validates no more than names, labels and the main fields of the schema.

    With `auto_ready` a controller runs that decides as agent-sandbox's does (0.5.6) and writes
    the same conditions in the same steps: for pods that start, fail, or are deleted under it
    (`delete_pod`, `fail_pod`), for ``spec.operatingMode`` and ``spec.shutdownTime`` (`suspend`,
    `resume`, `expire`), and for a name that an old pod still holds. It leaves a Sandbox alone
    once somebody else has written its status, until the test does something to its pod.

    Controllers of SandboxClaims and SandboxWarmPools run then too (`add_warm_pool`), and decide
    as the real ones do: a claim binds a member of its pool that has an address, or else starts
    cold under its own name; a Sandbox that is deleted under it is replaced by another; the pool
    is filled up again. What a claim or pool owns goes with it, with or without `auto_ready`.
    Where a test names an object, the name of a claim stands for its Sandbox's pod as well.

    Every call yields to the loop before the operation is carried out and again before it
    answers, so that races show. All delays are on the loop's clock. The constructor needs
    no running loop, and no tasks are made at all.

    Args:
        versions: The API versions that are served; see `versions`.
        auto_ready: Whether a new Sandbox's pod, and each that follows it, becomes ready: True
            at once, a number after so many seconds (``math.inf``: never). A function of the
            Sandbox returns one of these, or the status to write, or None to leave it. False:
            nothing happens until the test calls `set_ready` or `set_status`.
        namespaces: The namespaces that exist; None: all.
        user: The user in the texts of 403 answers.
        now: The wall clock of timestamps and of ``spec.shutdownTime``, in Unix seconds.
        history: How many changes and requests are remembered; a watch that lags further
            behind gets 410.
        bookmark_interval: Seconds between the BOOKMARK events of a watch that allows them;
            one more comes shortly before its end.
        pod_termination: Seconds that a deleted pod takes until it is gone; for the second half
            it is Succeeded or Failed.
        extensions: Whether the group of claims and pools is installed.

    Attributes:
        faults: Makes requests slow, hang or fail: `Faults.add`.
        linger_deletes: While true, a deletion only marks the object, as if a finalizer
            held it, until `finish_deletes`.
        quota: How many Sandboxes a namespace may hold before a create is refused with 403
            ``exceeded quota``; None: any number.
        claim_quota: The same for SandboxClaims.
        pod_refusal: What the API server answers when the controller creates a pod, such as
            ``pods "x" is forbidden: violates PodSecurity``; empty: it creates it.
    """

    async def create_namespaced_custom_object(
        self, group: str, version: str, namespace: str, plural: str, body: Any, **kwargs: Any
    ) -> Any:
        """Creates an object, as kubernetes_asyncio's method does."""
        body = plain(body)
        call = Call("create", group, version, namespace, plural, name_in(body), body)

        def create() -> Object:
            if self._namespaces is not None and namespace not in self._namespaces:
                raise _status.namespace_not_found(namespace)
            return self._store_of(call).create(namespace, version, body, dry_run=dry(kwargs))

        return await self._call(call, kwargs, WRITE | {"pretty"}, create)

    async def get_namespaced_custom_object(
        self, group: str, version: str, namespace: str, plural: str, name: str, **kwargs: Any
    ) -> Any:
        """Returns an object, as kubernetes_asyncio's method does."""
        call = Call("get", group, version, namespace, plural, name)
        return await self._call(call, kwargs, COMMON, lambda: self._store_of(call).find(namespace, name))

    async def get_namespaced_custom_object_status(
        self, group: str, version: str, namespace: str, plural: str, name: str, **kwargs: Any
    ) -> Any:
        """The same: an object's status is part of it."""
        call = Call("get", group, version, namespace, plural, name)
        return await self._call(call, kwargs, COMMON, lambda: self._store_of(call).find(namespace, name))

    async def list_namespaced_custom_object(
        self, group: str, version: str, namespace: str, plural: str, **kwargs: Any
    ) -> Any:
        """Lists, or with ``watch=True`` watches: then the answer's ``content.readline()``
        gives events as JSON lines."""
        watching = str(kwargs.get("watch", "false")).lower() not in ("false", "0", "none")
        call = Call("watch" if watching else "list", group, version, namespace, plural)
        operation = functools.partial(self._watch if watching else self._list, call, kwargs)
        answer = await self._call(call, kwargs, LIST, operation)
        if watching and kwargs.get("_preload_content", True):
            with_all = await answer.text()
            answer.close()
            return parsed(with_all)
        return answer

    async def patch_namespaced_custom_object(
        self, group: str, version: str, namespace: str, plural: str, name: str, body: Any, **kwargs: Any
    ) -> Any:
        """Patches all but the status. A dict without ``_content_type`` goes out as JSON patch,
        as kubernetes_asyncio sends it, and is refused."""
        return await self._patch(Call("patch", group, version, namespace, plural, name, plain(body)), kwargs)

    async def patch_namespaced_custom_object_status(
        self, group: str, version: str, namespace: str, plural: str, name: str, body: Any, **kwargs: Any
    ) -> Any:
        """Patches the status alone."""
        call = Call("patch_status", group, version, namespace, plural, name, plain(body))
        return await self._patch(call, kwargs)

    async def replace_namespaced_custom_object(
        self, group: str, version: str, namespace: str, plural: str, name: str, body: Any, **kwargs: Any
    ) -> Any:
        """Replaces an object but for its status, as kubernetes_asyncio's method does."""
        call = Call("replace", group, version, namespace, plural, name, plain(body))
        return await self._replace(call, kwargs)

    async def replace_namespaced_custom_object_status(
        self, group: str, version: str, namespace: str, plural: str, name: str, body: Any, **kwargs: Any
    ) -> Any:
        """Replaces an object's status, as kubernetes_asyncio's method does."""
        call = Call("replace_status", group, version, namespace, plural, name, plain(body))
        return await self._replace(call, kwargs)

    async def delete_namespaced_custom_object(
        self, group: str, version: str, namespace: str, plural: str, name: str, **kwargs: Any
    ) -> Any:
        """Deletes; ``body`` is a V1DeleteOptions or a dict, for preconditions. Of the propagation
        policies, Foreground counts for claims and pools; all others are Background."""
        options = plain(kwargs.get("body")) or {}
        call = Call("delete", group, version, namespace, plural, name, options)

        def delete() -> Object:
            return self._store_of(call).delete(namespace, name, options, dry_run=dry(kwargs))

        return await self._call(call, kwargs, DELETE, delete)

    async def get_api_resources(self, group: str, version: str, **kwargs: Any) -> Any:
        """Tells what a version serves; a plain-text 404 where it is not served."""
        call = Call("discovery", group, version)
        return await self._call(call, kwargs, COMMON, lambda: resources(self._served(call), version))

    async def _call(
        self, call: Call, kwargs: dict[str, Any], known: Iterable[str], operation: Callable[[], Any]
    ) -> Any:
        """Carries out one request, with the faults that it meets."""
        check_arguments(call, kwargs, known)
        loop = asyncio.get_running_loop()
        request = Request(
            *(call.verb, call.name, call.namespace, call.version, call.body, dict(kwargs)),
            *(loop.time(), call.plural),
        )
        self._requests.append(request)
        self._counts[call.verb] += 1
        self._poke()
        raw = not kwargs.get("_preload_content", True)
        try:
            async with asyncio.timeout(timeouts(kwargs)[0]):
                answer = await self._carried_out(call, request, operation)
        except api_exceptions() as refusal:
            if raw:
                return Response.of_refusal(refusal)
            raise
        if raw and not isinstance(answer, Response):
            return Response.of(201 if call.verb == "create" else 200, plain(answer))
        return answer

    async def _carried_out(self, call: Call, request: Request, operation: Callable[[], Any]) -> Any:
        def answered() -> Any:
            if self._closed:
                raise RuntimeError("Session is closed")
            self._check_served(call)
            found = operation()
            if isinstance(found, dict) and found.get("kind") in _NAMES:
                return copied(shown(found, call.version))
            return found

        def abandoned() -> None:
            if not self._closed and isinstance(answer := answered(), Response):
                answer.close()

        plan = self.faults._plan(request)
        await asyncio.sleep(0)
        for fault in plan:
            if not fault._after:
                await fault._apply(request, abandoned)
        answer = answered()
        try:
            await asyncio.sleep(0)
            for fault in plan:
                if fault._after:
                    await fault._apply(request, abandoned)
        except BaseException:
            if isinstance(answer, Response):
                answer.close()
            raise
        return answer

    def _check_served(self, call: Call) -> None:
        """Authorization comes first: a caller that may not list does not learn what is served."""
        served = self._served(call)
        if call.verb in self._forbidden:
            if call.verb == "discovery":
                raise _status.discovery_forbidden(self._user, f"/apis/{call.group}/{call.version}")
            verb = _RBAC.get(call.verb, call.verb)
            of = next((of for of in KINDS if (of.group, of.plural) == (call.group, call.plural)), SANDBOX)
            resource = f"{of.plural}/status" if call.verb.endswith("_status") else of.plural
            name = None if call.verb == "create" else call.name
            raise _status.forbidden(of, self._user, verb, resource, name, call.namespace)
        if not served:
            raise _status.page_not_found()

    def _served(self, call: Call) -> list[Kind]:
        """The kinds that a request is for: one, or for discovery all of the group."""
        return [
            of
            for of in KINDS
            if of.group == call.group
            and call.version in (self._versions if of is SANDBOX else of.versions)
            and call.plural in ("", of.plural)
            and (self.extensions or of is SANDBOX)
        ]

    def _store_of(self, call: Call) -> Store:
        (of,) = self._served(call)
        return self._stores[of]

    async def _patch(self, call: Call, kwargs: dict[str, Any]) -> Any:
        kind = content_type(kwargs.get("_content_type"))
        namespace, name, status = call.namespace, call.name or "", call.verb == "patch_status"

        def patch() -> Object:
            return self._store_of(call).patch(
                namespace, call.version, name, call.body, kind, status=status, dry_run=dry(kwargs)
            )

        return await self._call(call, kwargs, PATCH, patch)

    async def _replace(self, call: Call, kwargs: dict[str, Any]) -> Any:
        namespace, name, status = call.namespace, call.name or "", call.verb == "replace_status"

        def replace() -> Object:
            return self._store_of(call).replace(
                namespace, call.version, name, call.body, status=status, dry_run=dry(kwargs)
            )

        return await self._call(call, kwargs, WRITE, replace)

    def _list(self, call: Call, kwargs: dict[str, Any]) -> Object:
        chosen = selector(call.namespace, kwargs.get("label_selector"), kwargs.get("field_selector"))
        at, token = revision(kwargs), kwargs.get("_continue")
        number(kwargs, "timeout_seconds")
        if token and at:
            raise _status.bad_request("specifying resource version is not allowed when using continue")
        exact = kwargs.get("resource_version_match") == "Exact"
        store = self._store_of(call)
        items, metadata = store.list(
            chosen, limit=number(kwargs, "limit") or 0, token=token, revision=at, exact=exact
        )
        answer = {"apiVersion": f"{call.group}/{call.version}", "kind": f"{store.of.kind}List"}
        return {
            **answer,
            "items": [copied(shown(item, call.version)) for item in items],
            "metadata": metadata,
        }

    def _watch(self, call: Call, kwargs: dict[str, Any]) -> Watch:
        chosen = selector(call.namespace, kwargs.get("label_selector"), kwargs.get("field_selector"))
        since, seconds = revision(kwargs), number(kwargs, "timeout_seconds")
        store = self._store_of(call)
        watch = Watch(
            store.of,
            chosen,
            call.version,
            lambda: store.revision,
            since=since or 0,
            seconds=seconds or WATCH_SECONDS,
            bookmarks=self._bookmark_interval if kwargs.get("allow_watch_bookmarks") else None,
            timeouts=timeouts(kwargs),
            on_end=self._watch_ended,
        )
        self._watches[watch] = None
        if not since:
            for sandbox in store.list(chosen)[0]:
                watch.send("ADDED", sandbox)
        elif since < store.compacted:
            watch.send("ERROR", _status.expired_watch(since, store.compacted))
            watch.cut()
        else:
            for change in store.since(since):
                watch.offer(change)
        self._poke()
        return watch
