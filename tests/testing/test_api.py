"""FakeCustomObjectsApi: faults, what tests look at, and what they do to the cluster."""

from __future__ import annotations

import asyncio
import datetime as dt
import enum
import inspect
import json
from typing import Any

import pytest
from kubernetes_asyncio.client import ApiException, CustomObjectsApi, V1Container, V1PodSpec
from kubernetes_asyncio.client.exceptions import ApiTypeError

from prodisco_sandbox import SandboxManager, SandboxManagerConfig
from prodisco_sandbox.testing import FakeCustomObjectsApi, FakeSandboxServer, Request
from tests.support.api import GROUP, MERGE, PLURAL, body
from tests.support.fake_api import AT, create, delete, get, now, opened, patch, status_of


@pytest.fixture
async def api() -> Any:
    async with FakeCustomObjectsApi() as api:
        yield api


async def test_the_example_of_the_documentation() -> None:
    async with FakeSandboxServer() as server, FakeCustomObjectsApi(auto_ready=True) as api:
        api.faults.add("create", lost=True, times=1)
        config = SandboxManagerConfig(mode="multi", endpoint=lambda sandbox: server.target)
        async with SandboxManager(config, custom_objects_api=api) as manager:
            await manager.get_client("session")
            assert len(api.objects) == 1
        assert not api.objects
        assert not api.watches


@pytest.mark.looptime
class TestControls:
    async def test_requests_are_recorded(self, api: FakeCustomObjectsApi) -> None:
        await asyncio.sleep(3)
        await create(api)
        await patch(api, {"metadata": {"labels": {"a": "b"}}}, _request_timeout=5)
        await status_of(get(api, "b"))
        first, second, third = api.requests
        assert first == Request("create", "a", "n", "v1beta1", body("a"), {}, 3.0)
        assert (second.verb, second.body) == ("patch", {"metadata": {"labels": {"a": "b"}}})
        assert second.options == {"_content_type": MERGE, "_request_timeout": 5}
        assert (third.verb, third.name) == ("get", "b")
        assert (api.count("get"), api.count("get", "b"), api.count("get", "a")) == (1, 1, 0)

    async def test_what_is_looked_at_are_copies(self, api: FakeCustomObjectsApi) -> None:
        given = body("a", labels={"x": "1"})
        answer = await api.create_namespaced_custom_object(*AT, given)
        listed = await api.list_namespaced_custom_object(*AT)
        looked_at = api.get("a")
        assert looked_at is not None
        for sandbox in (given, answer, await get(api), listed["items"][0], api.objects[0], looked_at):
            sandbox["metadata"]["labels"]["x"] = "2"
            sandbox["spec"]["podTemplate"]["spec"]["containers"].clear()
        found = await get(api)
        assert found["metadata"]["labels"] == {"x": "1"}
        assert len(found["spec"]["podTemplate"]["spec"]["containers"]) == 1

    async def test_get_by_name(self, api: FakeCustomObjectsApi) -> None:
        await create(api)
        assert api.get("a") == api.get("a", "n") == await get(api)
        assert api.get("a", "other") is api.get("b") is None
        with pytest.raises(KeyError, match="there is no Sandbox 'b'; there are: a"):
            api.set_ready("b")

    async def test_until_waits_for_a_condition(self, api: FakeCustomObjectsApi) -> None:
        task = asyncio.create_task(api.until(lambda: len(api.objects) == 2))
        await create(api)
        assert not task.done()
        await create(api, "b")
        await task
        waiting = asyncio.create_task(api.until(lambda: api.watches))
        await asyncio.sleep(1)
        watch = await opened(api)
        await waiting
        watch.close()
        await api.until(lambda: not api.watches)
        with pytest.raises(TimeoutError):
            await api.until(lambda: api.count("delete"), timeout=3)
        await delete(api)

    async def test_subscribers_hear_of_changes(self, api: FakeCustomObjectsApi) -> None:
        heard: list[tuple[str, Any]] = []
        end = api.subscribe(lambda kind, sandbox: heard.append((kind, sandbox)))
        created = await create(api)
        changed = await patch(api, {"metadata": {"labels": {"a": "b"}}})
        await delete(api)
        assert heard == [("ADDED", created), ("MODIFIED", changed), ("DELETED", changed)]
        end()
        end()
        await create(api)
        assert len(heard) == 3

    async def test_ending_a_subscription_leaves_others_of_the_same_function(
        self, api: FakeCustomObjectsApi
    ) -> None:
        heard: list[str] = []

        def hear(kind: str, sandbox: Any) -> None:
            heard.append(kind)

        end, _ = api.subscribe(hear), api.subscribe(hear)
        end()
        end()
        await create(api)
        assert heard == ["ADDED"]

    async def test_a_subscriber_may_delete_what_was_just_created(self, api: FakeCustomObjectsApi) -> None:
        api.subscribe(lambda kind, _: api.delete_now("a") if kind == "ADDED" else None)
        assert (await create(api))["metadata"]["name"] == "a"
        assert api.objects == []

    async def test_a_subscriber_may_change_things(self, api: FakeCustomObjectsApi) -> None:
        def ready(kind: str, sandbox: Any) -> None:
            if kind == "ADDED":
                api.set_ready(sandbox["metadata"]["name"])

        api.subscribe(ready)
        watch = await opened(api)
        answer = await create(api)
        assert "status" not in answer
        kinds = [json.loads(await watch.content.readline())["type"] for _ in range(2)]
        assert kinds == ["ADDED", "MODIFIED"]
        watch.close()

    async def test_a_forbidden_verb_is_allowed_again(self, api: FakeCustomObjectsApi) -> None:
        api.forbid("create", "discovery")
        assert await status_of(create(api)) == 403
        with pytest.raises(ApiException) as caught:
            await api.get_api_resources(GROUP, "v1beta1")
        assert f'cannot get path "/apis/{GROUP}/v1beta1"' in json.loads(caught.value.body)["message"]
        api.allow("create")
        await create(api)
        api.allow()
        await api.get_api_resources(GROUP, "v1beta1")
        with pytest.raises(ValueError, match="verb is 'post'"):
            api.forbid("post")  # type: ignore[arg-type]

    async def test_a_quota_per_namespace(self, api: FakeCustomObjectsApi) -> None:
        assert api.quota is None
        api.quota = 1
        await create(api)
        assert await status_of(create(api, "b")) == 403
        at = (GROUP, "v1beta1", "other", PLURAL)
        await api.create_namespaced_custom_object(*at, body("b"))
        await delete(api)
        await create(api, "b")

    async def test_deletions_linger(self, api: FakeCustomObjectsApi) -> None:
        api.linger_deletes = True
        assert api.linger_deletes
        await create(api)
        marked = await delete(api)
        assert marked["metadata"]["deletionTimestamp"]
        assert await delete(api) == marked
        assert await status_of(create(api)) == 409
        await create(api, "b")
        api.finish_deletes()
        assert [sandbox["metadata"]["name"] for sandbox in api.objects] == ["b"]
        await delete(api, "b")
        assert api.objects == []

    async def test_delete_now(self, api: FakeCustomObjectsApi) -> None:
        await api.create_namespaced_custom_object(*AT, body("a", finalizers=["example.com/a"]))
        api.delete_now("a", namespace="n")
        assert api.objects == []

    async def test_set_ready(self, api: FakeCustomObjectsApi) -> None:
        given = body("a")
        given["spec"]["service"] = True
        await api.create_namespaced_custom_object(*AT, given)
        await create(api, "b")
        for name in "ab":
            api.set_ready(name)
        first, second = await get(api, "a"), await get(api, "b")
        assert first["status"]["serviceFQDN"] == "a.n.svc.cluster.local"
        kinds = {condition["type"]: condition["status"] for condition in first["status"]["conditions"]}
        assert kinds == {"Suspended": "False", "PodScheduled": "True", "Ready": "True"}
        assert "serviceFQDN" not in second["status"]
        assert first["status"]["podIPs"] != second["status"]["podIPs"]
        api.set_ready("a", podIPs=["10.0.0.7"])
        changed = await get(api, "a")
        assert changed["status"]["podIPs"] == ["10.0.0.7"]
        assert changed["metadata"]["generation"] == 1

    async def test_conditions_keep_their_time(self) -> None:
        clock = iter([0.0, 100.0, 200.0])
        async with FakeCustomObjectsApi(now=lambda: next(clock)) as api:
            await create(api)
            api.set_condition("a", "Ready", "False", "Starting")
            api.set_condition("a", "Ready", "False", "StillStarting", "soon")
            (condition,) = (await get(api))["status"]["conditions"]
            assert condition["lastTransitionTime"] == "1970-01-01T00:01:40Z"
            assert (condition["reason"], condition["message"]) == ("StillStarting", "soon")
            api.set_condition("a", "Ready", "True")
            (condition,) = (await get(api))["status"]["conditions"]
            assert condition["lastTransitionTime"] == "1970-01-01T00:03:20Z"
            api.set_status("a", {"serviceFQDN": "x"})
            assert (await get(api))["status"] == {"serviceFQDN": "x"}
            with pytest.raises(ApiException):
                api.set_status("a", {"serviceFQDN": 1})

    @pytest.mark.parametrize(
        ("auto_ready", "at"),
        [(True, 0.0), (0, 0.0), (3.0, 3.0), (lambda sandbox: 4.0, 4.0), (lambda sandbox: True, 0.0)],
    )
    async def test_sandboxes_get_ready_by_themselves(self, auto_ready: Any, at: float) -> None:
        async with FakeCustomObjectsApi(auto_ready=auto_ready) as api:
            assert "status" not in await create(api)
            watch = await opened(api, resource_version=api.resource_version)
            addresses, before = None, []
            while addresses is None:
                before.append(now())
                event = json.loads(await watch.content.readline())
                addresses = event["object"].get("status", {}).get("podIPs")
            assert set(before) == {0.0}
            assert addresses
            assert now() == at
            watch.close()

    async def test_a_function_decides_what_becomes_of_a_sandbox(self) -> None:
        def decide(sandbox: Any) -> Any:
            name = sandbox["metadata"]["name"]
            return {"status": {"serviceFQDN": "x"}, "none": None, "false": False}[name]

        async with FakeCustomObjectsApi(auto_ready=decide) as api:
            for name in ("status", "none", "false"):
                await create(api, name)
            await asyncio.sleep(10)
            assert (await get(api, "status"))["status"] == {"serviceFQDN": "x"}
            for name in ("none", "false"):
                assert "status" not in await get(api, name)

    async def test_a_sandbox_that_is_gone_does_not_get_ready(self) -> None:
        async with FakeCustomObjectsApi(auto_ready=5.0) as api:
            for name in "abc":
                await create(api, name)
            await delete(api, "a")
            await delete(api, "b")
            api.linger_deletes = True
            await delete(api, "c")
            await asyncio.sleep(4)
            second = await create(api, "b")  # another one, whose own time is later
            await asyncio.sleep(2)
            found = await get(api, "b")
            assert found["metadata"]["uid"] == second["metadata"]["uid"]
            for sandbox in (found, await get(api, "c")):
                assert "podIPs" not in sandbox["status"]
            await asyncio.sleep(4)
            assert "podIPs" in (await get(api, "b"))["status"]
        with pytest.raises(ValueError, match="auto_ready is -1"):
            FakeCustomObjectsApi(auto_ready=-1)

    async def test_versions_change_while_it_runs(self, api: FakeCustomObjectsApi) -> None:
        assert api.versions == ("v1beta1", "v1alpha1")
        await create(api)
        api.versions = ()
        assert await status_of(get(api)) == 404
        assert api.objects[0]["apiVersion"] == f"{GROUP}/v1beta1"
        api.versions = ("v1alpha1",)
        assert api.objects[0]["apiVersion"] == f"{GROUP}/v1alpha1"

    async def test_a_closed_api_refuses(self) -> None:
        api = FakeCustomObjectsApi(auto_ready=5.0)
        api.subscribe(print)
        gate = api.faults.add("get", hold=True)
        async with api:
            await create(api)
            held = asyncio.create_task(get(api))
            await gate.reached()
            watch = await opened(api, resource_version=api.resource_version)
        await api.aclose()
        assert await watch.content.readline() == b""
        for call in (held, create(api, "b")):
            with pytest.raises(RuntimeError, match="closed"):
                await call
        await asyncio.sleep(10)
        assert "podIPs" not in api.objects[0].get("status", {})


async def test_it_is_made_without_a_loop() -> None:
    api = await asyncio.to_thread(FakeCustomObjectsApi, auto_ready=True)
    await create(api)
    await api.aclose()


class Policy(enum.StrEnum):
    DELETE = "Delete"


async def test_bodies_may_hold_models(api: FakeCustomObjectsApi) -> None:
    given = body("a")
    spec = V1PodSpec(containers=[V1Container(name="a", image_pull_policy="Never")])
    given["spec"]["podTemplate"]["spec"] = spec
    given["spec"]["shutdownTime"] = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)
    given["spec"]["shutdownPolicy"] = Policy.DELETE
    created = await api.create_namespaced_custom_object(*AT, given)
    container = {"name": "a", "imagePullPolicy": "Never"}
    assert created["spec"]["podTemplate"]["spec"] == {"containers": [container]}
    assert created["spec"]["shutdownTime"] == "2030-01-01T00:00:00+00:00"
    assert type(created["spec"]["shutdownPolicy"]) is str
    given["spec"]["other"] = object()
    with pytest.raises(TypeError, match="Object of type object is not JSON serializable"):
        await api.create_namespaced_custom_object(*AT, given)


async def test_discovery_without_preload(api: FakeCustomObjectsApi) -> None:
    async with await api.get_api_resources(GROUP, "v1beta1", _preload_content=False) as response:
        assert (await response.json())["groupVersion"] == f"{GROUP}/v1beta1"


async def test_there_is_no_server_side_apply(api: FakeCustomObjectsApi) -> None:
    await create(api)
    kind = "application/apply-patch+yaml"
    with pytest.raises(NotImplementedError, match="merge patch"):
        await api.patch_namespaced_custom_object(*AT, "a", body("a"), _content_type=kind)


class _NoClient:
    """An ApiClient that sends nothing, to see what CustomObjectsApi itself accepts."""

    client_side_validation = True

    def select_header_accept(self, accepts: Any) -> str:
        return "application/json"

    def select_header_content_type(self, *args: Any) -> str:
        return "application/json"

    async def call_api(self, *args: Any, **kwargs: Any) -> None:
        return None


_METHODS = [
    name
    for name in vars(FakeCustomObjectsApi)
    if not name.startswith("_") and inspect.iscoroutinefunction(getattr(FakeCustomObjectsApi, name))
]
_PARAMETERS = {"group": GROUP, "version": "v1beta1", "namespace": "n", "plural": PLURAL, "name": "a"}


@pytest.mark.parametrize("method", _METHODS)
async def test_the_arguments_are_those_of_the_real_one(api: FakeCustomObjectsApi, method: str) -> None:
    real, fake = getattr(CustomObjectsApi(_NoClient()), method), getattr(api, method)
    names = list(inspect.signature(real).parameters)
    assert list(inspect.signature(fake).parameters) == names
    given = {**_PARAMETERS, "body": {}}
    required = {name: given[name] for name in names if name != "kwargs"}
    for option in _options():
        if option not in required:
            assert await _accepts(fake, required, option) == await _accepts(real, required, option), option


def _options() -> set[str]:
    """All that any of the methods documents, and a few that none knows."""
    found = {"_continue", "_content_type", "_headers", "_preload_content", "_request_timeout", "nonsense"}
    for method in _METHODS:
        documented = inspect.getdoc(getattr(CustomObjectsApi, f"{method}_with_http_info")) or ""
        lines = [line.split()[1] for line in documented.splitlines() if line.startswith(":param ")]
        found |= {word.rstrip(":") for word in lines}
    assert {"label_selector", "dry_run", "force", "propagation_policy"} <= found
    return found


async def _accepts(method: Any, required: dict[str, Any], option: str) -> bool:
    try:
        await method(**required, **{option: None})
    except ApiTypeError:
        return False
    except (ApiException, TypeError):
        pass
    return True
