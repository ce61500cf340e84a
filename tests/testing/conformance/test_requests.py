"""What holds for the single requests of an API server, fake or real."""

from __future__ import annotations

import json

import pytest
from kubernetes_asyncio.client import ApiException, V1DeleteOptions, V1Preconditions
from kubernetes_asyncio.client.exceptions import ApiTypeError, ApiValueError

from tests.support.api import GROUP, PLURAL, QUOTA, Cluster, Object, body, lean, refusal


class TestRequests:
    async def test_discovery_tells_what_is_served(self, cluster: Cluster) -> None:
        for version in ("v1beta1", "v1alpha1"):
            for api in (cluster.api, cluster.nobody):
                found = await api.get_api_resources(GROUP, version)
                assert found.group_version == f"{GROUP}/{version}"
                resources = {resource.name: resource for resource in found.resources}
                assert resources[PLURAL].kind == "Sandbox"
                assert resources[PLURAL].namespaced
                assert {"create", "get", "list", "watch", "delete", "patch"} <= set(resources[PLURAL].verbs)
                assert set(resources[f"{PLURAL}/status"].verbs) == {"get", "patch", "update"}

    async def test_what_is_not_served_is_plain_text(self, cluster: Cluster) -> None:
        sandbox = body("a", version="v9")
        for answer in (
            cluster.api.get_api_resources(GROUP, "v9"),
            cluster.api.get_api_resources("other.io", "v1"),
            cluster.create(sandbox, "v9"),
            cluster.get("a", "v9"),
            cluster.list_("v9"),
            cluster.patch("a", {"metadata": {"labels": {"a": "b"}}}, "v9"),
            cluster.delete("a", "v9"),
            cluster.api.list_namespaced_custom_object(GROUP, "v1beta1", cluster.namespace, "others"),
        ):
            with pytest.raises(ApiException) as caught:
                await answer
            assert (caught.value.status, caught.value.reason) == (404, "Not Found")
            assert caught.value.body == "404 page not found\n"
            assert caught.value.headers["Content-Type"].startswith("text/plain")

    async def test_create(self, cluster: Cluster) -> None:
        given = body("a", labels={"x": "1"}, uid="u", generation=7, deletionTimestamp="2001-01-01T00:00:00Z")
        given["status"] = {"serviceFQDN": "nowhere"}
        before = (await cluster.list_())["metadata"]["resourceVersion"]
        created = await cluster.create(given)
        assert created["apiVersion"] == f"{GROUP}/v1beta1"
        metadata = created["metadata"]
        assert metadata["namespace"] == cluster.namespace
        assert metadata["generation"] == 1
        assert len(metadata["uid"]) == 36
        assert "deletionTimestamp" not in metadata
        assert metadata["creationTimestamp"].endswith("Z")
        assert int(metadata["resourceVersion"]) > int(before)
        assert "status" not in created
        assert created["spec"]["shutdownPolicy"] == "Retain"
        assert await cluster.get("a") == created
        listed = await cluster.list_()
        assert listed["kind"] == "SandboxList"
        assert listed["items"] == [created]
        assert int(listed["metadata"]["resourceVersion"]) >= int(metadata["resourceVersion"])

    async def test_versions_show_the_same_objects(self, cluster: Cluster) -> None:
        created = await cluster.create(body("a", version="v1alpha1"), "v1alpha1")
        assert created["apiVersion"] == f"{GROUP}/v1alpha1"
        seen = await cluster.get("a")
        assert seen["apiVersion"] == f"{GROUP}/v1beta1"
        assert seen["metadata"]["uid"] == created["metadata"]["uid"]
        assert (await cluster.list_("v1alpha1"))["items"][0]["apiVersion"] == f"{GROUP}/v1alpha1"

    async def test_generated_names(self, cluster: Cluster) -> None:
        names = {(await cluster.create(body(None, generateName="g-")))["metadata"]["name"] for _ in range(3)}
        assert len(names) == 3
        assert all(name.startswith("g-") and len(name) == 7 for name in names)

    async def test_a_name_is_taken_once(self, cluster: Cluster) -> None:
        await cluster.create(body("a", finalizers=["example.com/a"]))
        found = await refusal(cluster.create(body("a")), 409)
        assert found["reason"] == "AlreadyExists"
        assert found["message"] == f'{PLURAL}.{GROUP} "a" already exists'
        assert found["details"] == {"name": "a", "group": GROUP, "kind": PLURAL}
        await cluster.delete("a")
        found = await refusal(cluster.create(body("a")), 409)
        assert found["reason"] == "AlreadyExists"
        assert found["message"].startswith("object is being deleted: ")

    @pytest.mark.parametrize(
        ("change", "status", "field"),
        [
            ({"spec": None}, 422, "spec"),
            ({"spec": {}}, 422, "spec.podTemplate"),
            ({"spec": {"podTemplate": {}}}, 422, "spec.podTemplate.spec"),
            ({"spec": {"podTemplate": {"spec": {}}}}, 422, "spec.podTemplate.spec.containers"),
            ({"spec": "text"}, 422, "spec"),
            ({"spec": {"podTemplate": "text"}}, 422, "spec.podTemplate"),
            ({"service": "text"}, 422, "spec.service"),
            ({"shutdownTime": "soon"}, 422, "spec.shutdownTime"),
            ({"shutdownTime": "2030-01-01T00:00:00"}, 422, "spec.shutdownTime"),
            ({"shutdownPolicy": "Remove"}, 422, "spec.shutdownPolicy"),
            ({"operatingMode": "Paused"}, 422, "spec.operatingMode"),
            ({"name": None}, 422, "metadata.name"),
            ({"name": "A_b"}, 422, "metadata.name"),
            ({"name": "a" * 254}, 422, "metadata.name"),
            ({"labels": {"a": "x y"}}, 422, "metadata.labels"),
            ({"labels": {"a": "x" * 64}}, 422, "metadata.labels"),
            ({"labels": {"a b": "x"}}, 422, "metadata.labels"),
            ({"kind": "Other"}, 422, "kind"),
            ({"labels": {"a": 1}}, 400, None),
            ({"namespace": "elsewhere"}, 400, None),
            ({"apiVersion": "v1"}, 400, None),
            ({"apiVersion": f"{GROUP}/v1alpha1"}, 400, None),
            ({"kind": None}, 400, None),
            ({"resourceVersion": "5"}, 500, None),
        ],
        ids=str,
    )
    async def test_what_is_wrong_is_refused(
        self, cluster: Cluster, change: Object, status: int, field: str | None
    ) -> None:
        sandbox = body("a")
        for key, value in change.items():
            if key in ("spec", "kind", "apiVersion"):
                sandbox[key] = value
            elif key in ("service", "shutdownTime", "shutdownPolicy", "operatingMode"):
                sandbox["spec"][key] = value
            else:
                sandbox["metadata"][key] = value
        found = await refusal(cluster.create(sandbox), status)
        if field is None:
            assert found.get("reason") == {400: "BadRequest"}.get(status)
        else:
            assert found["reason"] == "Invalid"
            assert [cause["field"] for cause in found["details"]["causes"]] == [field]
            cause = found["details"]["causes"][0]
            assert cause["reason"].startswith("FieldValue")
            if cluster.current and "must be of type" in cause["message"] and field != "spec.shutdownTime":
                assert cause["reason"] == "FieldValueTypeInvalid"
            assert f"{field}: {cause['message']}" in found["message"]
        assert await cluster.names() == []

    async def test_what_is_no_object_is_refused(self, cluster: Cluster) -> None:
        for wrong in ("text", [1], {}, {**body("a"), "metadata": "text"}):
            assert (await refusal(cluster.create(wrong), 400))["reason"] == "BadRequest"
        await refusal(cluster.create({**body("a"), "metadata": None}), 422)

    async def test_what_is_missing_is_not_found(self, cluster: Cluster) -> None:
        for answer in (
            cluster.get("a"),
            cluster.delete("a"),
            cluster.patch("a", {"metadata": {"labels": {"a": "b"}}}),
            cluster.patch(
                "a", {"metadata": {"labels": {"a": "b"}}}, _content_type="application/json-patch+json"
            ),
            cluster.patch_status("a", {"status": {}}),
            cluster.replace("a", body("a")),
        ):
            found = await refusal(answer, 404)
            assert found["reason"] == "NotFound"
            assert found["message"] == f'{PLURAL}.{GROUP} "a" not found'
            assert found["details"] == {"name": "a", "group": GROUP, "kind": PLURAL}

    async def test_a_merge_patch_changes_what_it_names(self, cluster: Cluster) -> None:
        created = await cluster.create(body("a", labels={"x": "1", "y": "2"}))
        labelled = await cluster.patch("a", {"metadata": {"labels": {"x": None, "z": "3"}}})
        assert labelled["metadata"]["labels"] == {"y": "2", "z": "3"}
        assert labelled["metadata"]["generation"] == 1
        assert int(labelled["metadata"]["resourceVersion"]) > int(created["metadata"]["resourceVersion"])
        leased = await cluster.patch("a", {"spec": {"shutdownTime": "2030-01-01T00:00:00Z"}})
        assert leased["metadata"]["generation"] == 2
        assert leased["spec"] == {**created["spec"], "shutdownTime": "2030-01-01T00:00:00Z"}
        assert await cluster.patch("a", {"metadata": {"labels": {"z": "3"}}}) == leased
        assert "status" not in await cluster.patch("a", {"status": {"serviceFQDN": "x"}})

    async def test_patches_have_preconditions(self, cluster: Cluster) -> None:
        created = (await cluster.create(body("a")))["metadata"]
        right = {"uid": created["uid"], "resourceVersion": created["resourceVersion"]}
        await cluster.patch("a", {"metadata": {**right, "labels": {"a": "1"}}})
        found = await refusal(cluster.patch("a", {"metadata": {**right, "labels": {"a": "2"}}}), 409)
        assert found["reason"] == "Conflict"
        assert "the object has been modified" in found["message"]
        found = await refusal(cluster.patch("a", {"metadata": {"uid": "other", "labels": {"a": "2"}}}), 422)
        assert found["reason"] == "Invalid"
        assert found["details"]["causes"][0]["field"] == "metadata.uid"
        assert found["message"].endswith('metadata.uid: Invalid value: "other": field is immutable') or (
            'metadata.uid: Invalid value: "other": field is immutable' in found["message"]
        )
        assert (await cluster.get("a"))["metadata"]["labels"] == {"a": "1"}

    async def test_patches_that_are_refused(self, cluster: Cluster) -> None:
        created = await cluster.create(body("a"))
        labels = {"metadata": {"labels": {"a": "b"}}}
        at = (GROUP, "v1beta1", cluster.namespace, PLURAL, "a")
        found = await refusal(cluster.api.patch_namespaced_custom_object(*at, labels), 400)
        wanted = "value of type jsonpatch.Patch"
        if cluster.current:
            wanted = "value of type []handlers.jsonPatchOp"
        assert found["message"].endswith(f"json: cannot unmarshal object into Go {wanted}")
        assert found["message"].startswith("error decoding patch: ") == cluster.current
        found = await refusal(cluster.api.patch_namespaced_custom_object_status(*at, {"status": {}}), 400)
        assert found["reason"] == "BadRequest"
        for kind in ("application/json", "application/strategic-merge-patch+json"):
            for name in ("a", "missing"):
                found = await refusal(cluster.patch(name, labels, _content_type=kind), 415)
                assert found["reason"] == "UnsupportedMediaType"
        for wrong, status in (
            ({"metadata": {"name": "b"}}, 400),
            ({"metadata": {"name": None}}, 400),
            ({"metadata": None}, 400),
            ({"metadata": "text"}, 422),
            ({"metadata": {"labels": "text"}}, 422),
            ({"spec": "text"}, 422),
            ({"metadata": {"namespace": "elsewhere"}}, 400),
            ({"apiVersion": "v1"}, 422),
            ({"kind": "Other"}, 422),
            ({"spec": {"podTemplate": None}}, 422),
            ({"metadata": {"labels": {"a": "x y"}}}, 422),
            ([1], 400 if cluster.current else 422),
            ("text", 400 if cluster.current else 500),
        ):
            await refusal(cluster.patch("a", wrong), status)
        if cluster.current:
            for no_patch in ([1], ["text"], "text"):
                found = await refusal(cluster.api.patch_namespaced_custom_object(*at, no_patch), 400)
                assert found["message"].startswith("error decoding patch: json: cannot unmarshal ")
        assert await cluster.get("a") == created

    async def test_json_patches(self, cluster: Cluster) -> None:
        await cluster.create(body("a", labels={"x": "1"}))
        at = (GROUP, "v1beta1", cluster.namespace, PLURAL, "a")
        operations: list[Object] = [
            {"op": "test", "path": "/metadata/labels/x", "value": "1"},
            {"op": "copy", "from": "/metadata/labels/x", "path": "/metadata/labels/y"},
            {"op": "move", "from": "/metadata/labels/x", "path": "/metadata/labels/c~1d"},
            {"op": "add", "path": "/metadata/labels/z", "value": "3"},
            {"op": "replace", "path": "/metadata/labels/z", "value": "4"},
            {"op": "remove", "path": "/metadata/labels/y"},
            {"op": "add", "path": "/spec/podTemplate/spec/containers/-", "value": {"name": "last"}},
            {"op": "add", "path": "/spec/podTemplate/spec/containers/0", "value": {"name": "first"}},
            {"op": "replace", "path": "/spec/podTemplate/spec/containers/2", "value": {"name": "third"}},
        ]
        changed = lean(await cluster.api.patch_namespaced_custom_object(*at, operations))
        assert changed["metadata"]["labels"] == {"c/d": "1", "z": "4"}
        containers = changed["spec"]["podTemplate"]["spec"]["containers"]
        assert [container["name"] for container in containers] == ["first", "sandbox", "third"]
        for wrong in (
            {"op": "test", "path": "/metadata/labels/z", "value": "5"},
            {"op": "remove", "path": "/metadata/labels/none"},
            {"op": "remove", "path": "/spec/podTemplate/spec/containers/7"},
            {"op": "add", "path": "/nowhere/at/all", "value": 1},
            {"op": "other", "path": "/metadata/labels/z", "value": 1},
        ):
            found = await refusal(cluster.api.patch_namespaced_custom_object(*at, [wrong]), 422)
            assert found["reason"] == "Invalid"
        root: Object = {"op": "replace", "path": "", "value": "text"}
        await refusal(cluster.api.patch_namespaced_custom_object(*at, [root]), 422)
        assert await cluster.get("a") == changed

    async def test_the_status_is_a_resource_of_its_own(self, cluster: Cluster) -> None:
        created = await cluster.create(body("a"))
        condition = {
            "type": "Ready",
            "status": "True",
            "reason": "DependenciesReady",
            "message": "",
            "lastTransitionTime": "2030-01-01T00:00:00Z",
        }
        status = {"podIPs": ["10.0.0.1"], "serviceFQDN": "a.b", "conditions": [condition]}
        metadata = {"labels": {"a": "b"}, "uid": "other"}
        patch = {"metadata": metadata, "spec": {"shutdownTime": "2030-01-01T00:00:00Z"}, "status": status}
        changed = await cluster.patch_status("a", patch)
        assert changed["status"] == status
        assert changed["spec"] == created["spec"]
        assert "labels" not in changed["metadata"]
        assert changed["metadata"]["generation"] == 1
        assert int(changed["metadata"]["resourceVersion"]) > int(created["metadata"]["resourceVersion"])
        changed = await cluster.patch("a", {"status": None})
        assert changed["status"] == status
        stale = {"metadata": {"resourceVersion": created["metadata"]["resourceVersion"]}, "status": {}}
        await refusal(cluster.patch_status("a", stale), 409)
        at = (GROUP, "v1beta1", cluster.namespace, PLURAL, "a")
        assert lean(await cluster.api.get_namespaced_custom_object_status(*at)) == changed
        for wrong in (
            {"status": "text"},
            {"status": {"conditions": "text"}},
            {"status": {"podIPs": "text"}},
            {"status": {"serviceFQDN": 1}},
            {"status": {"conditions": [{"type": "Ready"}]}},
            {"status": {"conditions": ["Ready"]}},
            {"status": {"conditions": [{**condition, "message": 1}]}},
            {"status": {"conditions": [{**condition, "status": "Maybe"}]}},
            {"status": {"conditions": [{**condition, "reason": ""}]}},
            {"status": {"conditions": [{**condition, "lastTransitionTime": "now"}]}},
        ):
            assert (await refusal(cluster.patch_status("a", wrong), 422))["reason"] == "Invalid"
        assert await cluster.get("a") == changed

    async def test_replace(self, cluster: Cluster) -> None:
        created = await cluster.create(body("a", labels={"x": "1"}))
        wanted = json.loads(json.dumps(created))
        wanted["metadata"]["labels"] = {"y": "2"}
        wanted["spec"]["shutdownTime"] = "2030-01-01T00:00:00Z"
        wanted["status"] = {"serviceFQDN": "x"}
        replaced = await cluster.replace("a", wanted)
        assert replaced["metadata"]["labels"] == {"y": "2"}
        assert replaced["metadata"]["generation"] == 2
        assert "status" not in replaced
        assert (await refusal(cluster.replace("a", wanted), 409))["reason"] == "Conflict"
        del wanted["metadata"]["resourceVersion"]
        found = await refusal(cluster.replace("a", wanted), 422)
        assert found["details"]["causes"][0]["field"] == "metadata.resourceVersion"
        other = {**replaced, "metadata": {**replaced["metadata"], "uid": "other"}}
        found = await refusal(cluster.replace("a", other), 409)
        assert "Precondition failed: UID in precondition: other" in found["message"]
        await refusal(cluster.replace("b", replaced), 400)
        at = (GROUP, "v1beta1", cluster.namespace, PLURAL, "a")
        status = {**replaced, "spec": {}, "status": {"serviceFQDN": "x"}}
        changed = await cluster.api.replace_namespaced_custom_object_status(*at, status)
        assert (changed["spec"], changed["status"]) == (replaced["spec"], {"serviceFQDN": "x"})

    async def test_delete(self, cluster: Cluster) -> None:
        uid = (await cluster.create(body("a")))["metadata"]["uid"]
        gone = await cluster.delete("a")
        assert gone["kind"] == "Status"
        assert gone["status"] == "Success"
        assert gone["details"] == {"name": "a", "group": GROUP, "kind": PLURAL, "uid": uid}
        await refusal(cluster.get("a"), 404)
        assert (await cluster.create(body("a")))["metadata"]["uid"] != uid

    async def test_deletes_have_preconditions(self, cluster: Cluster) -> None:
        uid = (await cluster.create(body("a")))["metadata"]["uid"]
        for options in (
            V1DeleteOptions(preconditions=V1Preconditions(uid="other")),
            {"preconditions": {"uid": "other"}},
        ):
            found = await refusal(cluster.delete("a", body=options), 409)
            assert found["reason"] == "Conflict"
            assert found["details"] == {"name": "a", "group": GROUP, "kind": "Sandbox"}
            why = f"the UID in the precondition (other) does not match the UID in record ({uid})"
            assert why in found["message"]
        found = await refusal(cluster.delete("a", body={"preconditions": {"resourceVersion": "1"}}), 409)
        assert "the ResourceVersion in the precondition (1) does not match" in found["message"]
        await cluster.delete("a", dry_run="All")
        await cluster.delete("a", body={"dryRun": ["All"]})
        found = await refusal(cluster.delete("a", body=5), 400 if cluster.current else 500)
        assert found["message"].startswith("couldn't get version/kind; json parse error")
        if cluster.current:
            for wrong in ({"preconditions": "text"}, {"preconditions": {"uid": 5}}):
                found = await refusal(cluster.delete("a", body=wrong), 400)
                assert found["message"].startswith("json: cannot unmarshal ")
        await cluster.delete("a", body=V1DeleteOptions(preconditions=V1Preconditions(uid=uid)))
        await refusal(cluster.get("a"), 404)

    async def test_finalizers_hold_a_deletion(self, cluster: Cluster) -> None:
        await cluster.create(body("a", finalizers=["example.com/a"]))
        marked = await cluster.delete("a")
        assert marked["kind"] == "Sandbox"
        assert marked["metadata"]["deletionTimestamp"].endswith("Z")
        assert marked["metadata"]["deletionGracePeriodSeconds"] == 0
        assert marked["metadata"]["generation"] == 2
        assert await cluster.delete("a") == marked
        more = {"metadata": {"finalizers": ["example.com/a", "example.com/b"]}}
        found = await refusal(cluster.patch("a", more), 422)
        assert found["details"]["causes"][0]["reason"] == "FieldValueForbidden"
        touched = await cluster.patch("a", {"metadata": {"labels": {"a": "b"}}})
        assert touched["metadata"]["deletionTimestamp"] == marked["metadata"]["deletionTimestamp"]
        last = await cluster.patch("a", {"metadata": {"finalizers": None}})
        assert "finalizers" not in last["metadata"]
        await refusal(cluster.get("a"), 404)

    async def test_dry_runs_change_nothing(self, cluster: Cluster) -> None:
        assert "resourceVersion" not in (await cluster.create(body("a"), dry_run="All"))["metadata"]
        assert await cluster.names() == []
        await refusal(cluster.create(body("a"), dry_run="Some"), 422)
        created = await cluster.create(body("a"))
        tried = await cluster.patch("a", {"metadata": {"labels": {"a": "b"}}}, dry_run="All")
        assert tried["metadata"]["labels"] == {"a": "b"}
        assert await cluster.get("a") == created

    async def test_what_is_forbidden(self, cluster: Cluster) -> None:
        at = (GROUP, "v1beta1", cluster.namespace, PLURAL)
        api, patch = cluster.nobody, {"metadata": {"labels": {"a": "b"}}}
        for verb, resource, name, answer in (
            ("create", PLURAL, "", api.create_namespaced_custom_object(*at, body("a"))),
            ("get", PLURAL, "a", api.get_namespaced_custom_object(*at, "a")),
            ("list", PLURAL, "", api.list_namespaced_custom_object(*at)),
            ("delete", PLURAL, "a", api.delete_namespaced_custom_object(*at, "a")),
            ("patch", PLURAL, "a", api.patch_namespaced_custom_object(*at, "a", patch)),
            ("patch", f"{PLURAL}/status", "a", api.patch_namespaced_custom_object_status(*at, "a", patch)),
            ("update", PLURAL, "a", api.replace_namespaced_custom_object(*at, "a", body("a"))),
            ("list", PLURAL, "", api.list_namespaced_custom_object(GROUP, "v9", cluster.namespace, PLURAL)),
        ):
            found = await refusal(answer, 403)
            assert found["reason"] == "Forbidden"
            which = f' "{name}"' if name else ""
            assert found["message"] == (
                f'{PLURAL}.{GROUP}{which} is forbidden: User "nobody" cannot {verb} resource "{resource}"'
                f' in API group "{GROUP}" in the namespace "{cluster.namespace}"'
            )
            named = {"name": name} if name else {}
            assert found["details"] == {**named, "group": GROUP, "kind": PLURAL}

    async def test_a_quota(self, cluster: Cluster) -> None:
        await cluster.create(body("a"))
        await cluster.create(body("b"))
        await cluster.limit(2)
        for name in ("c", "a"):  # the quota is looked at before the name
            found = await refusal(cluster.create(body(name)), 403)
            assert found["reason"] == "Forbidden"
            assert found["message"] == (
                f'{PLURAL}.{GROUP} "{name}" is forbidden: exceeded quota: sandboxes,'
                f" requested: {QUOTA}=1, used: {QUOTA}=2, limited: {QUOTA}=2"
            )

    async def test_namespaces_must_exist_to_create(self, cluster: Cluster) -> None:
        at = (GROUP, "v1beta1", "nowhere", PLURAL)
        found = await refusal(cluster.api.create_namespaced_custom_object(*at, body("a")), 404)
        assert found["message"] == 'namespaces "nowhere" not found'
        assert found["details"] == {"name": "nowhere", "kind": "namespaces"}
        assert (await cluster.api.list_namespaced_custom_object(*at))["items"] == []

    async def test_answers_without_preload_are_responses(self, cluster: Cluster) -> None:
        created = await cluster.create(body("a"))
        async with await cluster.get("a", _preload_content=False) as response:
            assert (response.status, response.reason) == (200, "OK")
            assert lean(await response.json()) == created
        response = await cluster.create(body("b"), _preload_content=False)
        assert response.status == 201
        response.release()
        response = await cluster.create(body("a"), _preload_content=False)
        assert (response.status, response.reason) == (409, "Conflict")
        assert json.loads(await response.text())["reason"] == "AlreadyExists"
        response.close()

    async def test_unknown_arguments_are_type_errors(self, cluster: Cluster) -> None:
        with pytest.raises(ApiTypeError):
            await cluster.get("a", label_selector="a")
        with pytest.raises(ApiTypeError):
            await cluster.list_(body={})
        with pytest.raises(ApiValueError):
            await cluster.get(None)  # type: ignore[arg-type]
        with pytest.raises(ApiValueError):
            await cluster.patch("a", None)
