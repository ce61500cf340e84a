"""What holds for the watches of an API server, fake or real."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from kubernetes_asyncio import watch
from kubernetes_asyncio.client import ApiException

from tests.support.api import GROUP, PLURAL, Cluster, body, events
from tests.support.patience import PATIENCE


class TestWatches:
    async def test_a_watch_begins_with_what_there_is(self, cluster: Cluster) -> None:
        for name in "ab":
            await cluster.create(body(name, labels={"x": name}))
        for version in (None, "", "0"):
            async with cluster.watch(resource_version=version, seconds=1) as response:
                assert response.status == 200
                found = await events(response, 2)
                assert {(kind, item["metadata"]["name"]) for kind, item in found} == {
                    ("ADDED", "a"),
                    ("ADDED", "b"),
                }
                assert await response.content.readline() == b""
        async with cluster.watch(resource_version="0", label_selector="x=b") as response:
            assert (await events(response, 1))[0][1] == await cluster.get("b")

    async def test_a_watch_tells_what_changes_in_its_selection(self, cluster: Cluster) -> None:
        since = (await cluster.list_())["metadata"]["resourceVersion"]
        async with (
            cluster.watch(resource_version=since) as everything,
            cluster.watch("v1alpha1", resource_version=since, label_selector="x=1") as selected,
        ):
            await cluster.create(body("a", labels={"x": "1"}, finalizers=["example.com/a"]))
            inside = await cluster.patch_status("a", {"status": {"serviceFQDN": "q"}})
            out = await cluster.patch("a", {"metadata": {"labels": {"x": "2"}}})
            await cluster.patch("a", {"metadata": {"labels": {"x": "2"}}})  # changes nothing
            await cluster.patch("a", {"metadata": {"labels": {"z": "3"}}})
            back = await cluster.patch("a", {"metadata": {"labels": {"x": "1"}}})
            marked = await cluster.delete("a")
            await cluster.patch("a", {"metadata": {"finalizers": None, "labels": {"last": "1"}}})
            seen = await events(everything, 7)
            kinds = [kind for kind, _ in seen]
            assert kinds == ["ADDED", *["MODIFIED"] * 5, "DELETED"]
            assert "deletionTimestamp" in seen[5][1]["metadata"]
            # Gone: as it was last stored, under the version of its end.
            last = seen[6][1]
            assert {**last["metadata"], "resourceVersion": ""} == {
                **marked["metadata"],
                "resourceVersion": "",
            }
            assert int(last["metadata"]["resourceVersion"]) > int(marked["metadata"]["resourceVersion"])
            part = await events(selected, 6)
            assert [kind for kind, _ in part] == [
                *("ADDED", "MODIFIED", "DELETED"),
                *("ADDED", "MODIFIED", "DELETED"),
            ]
            assert {item["apiVersion"] for _, item in part} == {f"{GROUP}/v1alpha1"}
            # Out of the selection: as it was inside, under the version of the change.
            left = part[2][1]["metadata"]
            assert left["labels"] == inside["metadata"]["labels"]
            assert left["resourceVersion"] == out["metadata"]["resourceVersion"]
            assert part[3][1]["metadata"]["resourceVersion"] == back["metadata"]["resourceVersion"]
        # From an older version, all of it comes again.
        async with cluster.watch("v1alpha1", resource_version=since, label_selector="x=1") as replayed:
            assert await events(replayed, 6) == part
        async with cluster.watch(resource_version=since, field_selector="metadata.name=a") as named:
            assert await events(named, 7) == seen

    async def test_a_watch_from_a_version_too_old_ends_in_an_error(self, cluster: Cluster) -> None:
        await cluster.create(body("a"))
        await cluster.compact()
        async with cluster.watch(resource_version="1") as response:
            assert response.status == 200
            [(kind, status)] = await events(response, 1)
            assert kind == "ERROR"
            assert (status["kind"], status["reason"], status["code"]) == ("Status", "Expired", 410)
            assert "too old" in status["message"]
            assert await response.content.readline() == b""
        found = watch.Watch()
        with pytest.raises(ApiException) as caught:
            async for _ in found.stream(cluster.list_, resource_version="1", timeout_seconds=5):
                pass
        assert caught.value.status == 410

    async def test_watches_that_are_refused_are_responses(self, cluster: Cluster) -> None:
        at = (GROUP, "v1beta1", cluster.namespace, PLURAL)
        refused = await cluster.nobody.list_namespaced_custom_object(*at, watch=True, _preload_content=False)
        assert refused.status == 403
        assert "cannot watch resource" in (await refused.json())["message"]
        refused.close()
        wrong: tuple[tuple[dict[str, Any], int], ...] = (
            ({"resource_version": "x"}, 500),
            ({"label_selector": "a b"}, 400),
        )
        for kwargs, status in wrong:
            async with cluster.watch(**kwargs) as response:
                assert response.status == status
                assert (await response.json())["code"] == status
        async with cluster.watch("v9") as response:
            assert (response.status, await response.text()) == (404, "404 page not found\n")
        with pytest.raises(ApiException) as caught:
            await cluster.list_("v9", watch=True, timeout_seconds=1)
        assert caught.value.body == "404 page not found\n"

    async def test_a_watch_from_the_future_is_silent(self, cluster: Cluster) -> None:
        await cluster.create(body("a"))
        async with cluster.watch(resource_version="99999999", seconds=1) as response:
            await cluster.create(body("b"))
            assert await response.content.readline() == b""

    async def test_a_watch_that_is_read_whole(self, cluster: Cluster) -> None:
        await cluster.create(body("a"))
        found = await cluster.list_(watch=True, timeout_seconds=1)
        assert (found["type"], found["object"]["metadata"]["name"]) == ("ADDED", "a")
        await cluster.create(body("b"))
        text = await cluster.list_(watch=True, timeout_seconds=1)
        assert isinstance(text, str)
        assert len(text.splitlines()) == 2

    async def test_bookmarks_come_before_the_end(self, cluster: Cluster) -> None:
        since = (await cluster.create(body("a")))["metadata"]["resourceVersion"]
        async with cluster.watch(
            resource_version=since, label_selector="x=1", allow_watch_bookmarks=True, seconds=4
        ) as response:
            other = await cluster.create(body("b"))
            [(kind, item)] = await events(response, 1)
            assert kind == "BOOKMARK"
            assert item["kind"] == "Sandbox"
            assert item["apiVersion"] == f"{GROUP}/v1beta1"
            assert int(item["metadata"]["resourceVersion"]) >= int(other["metadata"]["resourceVersion"])

    async def test_the_watch_of_kubernetes_asyncio(self, cluster: Cluster) -> None:
        await cluster.create(body("a"))
        found = []
        async with watch.Watch() as stream:
            at = (GROUP, "v1beta1", cluster.namespace, PLURAL)
            async for event in stream.stream(
                cluster.api.list_namespaced_custom_object, *at, timeout_seconds=20
            ):
                found.append((event["type"], event["object"]["metadata"]["name"]))
                if found[-1] == ("ADDED", "a"):
                    await cluster.create(body("b"))
                    await cluster.delete("a")
                if len(found) == 3:
                    stream.stop()
                    break
        assert found == [("ADDED", "a"), ("ADDED", "b"), ("DELETED", "a")]

    async def test_a_change_of_the_served_versions_ends_watches(self, cluster: Cluster) -> None:
        await cluster.create(body("a", version="v1alpha1"), "v1alpha1")
        async with cluster.watch("v1alpha1") as response:
            await events(response, 1)
            await cluster.serve(("v1beta1",))
            async with asyncio.timeout(PATIENCE):
                assert await response.content.readline() == b""
        with pytest.raises(ApiException) as caught:
            await cluster.get("a", "v1alpha1")
        assert caught.value.body == "404 page not found\n"
        with pytest.raises(ApiException):
            await cluster.api.get_api_resources(GROUP, "v1alpha1")
        assert (await cluster.get("a"))["metadata"]["name"] == "a"
        await cluster.serve(("v1beta1", "v1alpha1"))
        assert (await cluster.get("a", "v1alpha1"))["metadata"]["name"] == "a"
