"""What holds for the lists of an API server, fake or real."""

from __future__ import annotations

import json

import pytest
from kubernetes_asyncio.client import ApiException

from tests.support.api import Cluster, body, refusal


class TestLists:
    async def test_selectors(self, cluster: Cluster) -> None:
        for name, labels in (("a", {"x": "1"}), ("b", {"x": "2"}), ("c", {"y": ""}), ("d", {})):
            await cluster.create(body(name, labels=labels))
        for selector, expected in {
            "": "abcd",
            "x=1": "a",
            "x==1": "a",
            "x!=1": "bcd",
            "x": "ab",
            "!x": "cd",
            "x in (1,2)": "ab",
            "x in (1, 3)": "a",
            "x in ()": "",
            "x notin (1,2)": "cd",
            "x notin (1),y": "c",
            " x = 1 , !y ": "a",
            "y=": "c",
            "x=1,x=2": "",
            "x>1": "b",
            "x<2": "a",
            "x=1,y": "",
        }.items():
            assert "".join(await cluster.names(label_selector=selector)) == expected, selector
        for selector, expected in {
            "metadata.name=a": "a",
            "metadata.name==a": "a",
            "metadata.name!=a": "bcd",
            f"metadata.namespace={cluster.namespace}": "abcd",
            "metadata.namespace=elsewhere": "",
            f"metadata.name=b,metadata.namespace={cluster.namespace}": "b",
        }.items():
            assert "".join(await cluster.names(field_selector=selector)) == expected, selector
        wrong = ("a=b=c", "a in b", "=b", "a b", "a=1,", ",a=1", "a!", "!a=1", "a in (x y)", "a<x", "a/b/c")
        for selector in (*wrong, f"a={'x' * 64}"):
            assert (await refusal(cluster.list_(label_selector=selector), 400))["reason"] == "BadRequest"
        for selector in ("spec.x=1", "x", "metadata.name=a,status=1"):
            assert (await refusal(cluster.list_(field_selector=selector), 400))["reason"] == "BadRequest"

    async def test_lists_in_pieces(self, cluster: Cluster) -> None:
        for name in "abcd":
            await cluster.create(body(name, labels={"x": "1"}))
        first = await cluster.list_(limit=2)
        assert [item["metadata"]["name"] for item in first["items"]] == ["a", "b"]
        assert first["metadata"]["remainingItemCount"] == 2
        token = first["metadata"]["continue"]
        await cluster.create(body("bb"))
        await cluster.delete("c")
        await cluster.patch("d", {"metadata": {"labels": {"x": "2"}}})
        # The rest is a snapshot: what has happened since does not show.
        rest = await cluster.list_(limit=2, _continue=token)
        assert [item["metadata"]["name"] for item in rest["items"]] == ["c", "d"]
        assert rest["items"][1]["metadata"]["labels"] == {"x": "1"}
        assert rest["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
        assert rest["metadata"]["continue"] == ""
        assert "remainingItemCount" not in (await cluster.list_(limit=1, label_selector="x"))["metadata"]
        assert len(await cluster.names(limit=0)) == len(await cluster.names(limit=100)) == 4
        await refusal(cluster.list_(_continue="garbage"), 400)
        await refusal(cluster.list_(_continue=token, resource_version="5"), 400)
        await cluster.compact()
        if cluster.keeps_snapshots:
            assert await cluster.names(limit=2, _continue=token) == ["c", "d"]
        await cluster.forget()
        found = await refusal(cluster.list_(limit=2, _continue=token), 410)
        assert found["reason"] == "Expired"
        assert await cluster.names(_continue=found["metadata"]["continue"]) == ["bb", "d"]

    async def test_lists_at_a_version(self, cluster: Cluster) -> None:
        first = (await cluster.create(body("a")))["metadata"]["resourceVersion"]
        await cluster.create(body("b"))
        assert await cluster.names(resource_version="0") is not None
        assert sorted(await cluster.names(resource_version=first)) == ["a", "b"]
        assert await cluster.names(resource_version=first, resource_version_match="Exact") == ["a"]
        found = await refusal(cluster.list_(resource_version="1", resource_version_match="Exact"), 410)
        assert found["reason"] == "Expired"
        with pytest.raises(ApiException) as caught:
            await cluster.list_(resource_version="99999999")
        assert (caught.value.status, caught.value.headers["retry-after"]) == (504, "1")
        assert json.loads(caught.value.body)["reason"] == "Timeout"
        await refusal(cluster.list_(resource_version="x"), 400 if cluster.current else 500)
        for wrong in ({"limit": "x"}, {"limit": 5.0}, {"timeout_seconds": 5.0}, {"timeout_seconds": "x"}):
            await refusal(cluster.list_(**wrong), 400)
