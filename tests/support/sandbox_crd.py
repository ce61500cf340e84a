"""A compact definition of agent-sandbox's Sandbox, with the fields that matter here.

The real one spells out all of a pod's fields, some 4,000 lines for each version; the
directory that AGENT_SANDBOX_CRDS names may hold those.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
TIME: Schema = {"type": "string", "format": "date-time"}
ANY: Schema = {"x-kubernetes-preserve-unknown-fields": True}


def sandbox_crd(*versions: str) -> Schema:
    """The CustomResourceDefinition that serves these versions and stores the first."""
    names = {"kind": "Sandbox", "listKind": "SandboxList", "plural": "sandboxes", "singular": "sandbox"}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "sandboxes.agents.x-k8s.io"},
        "spec": {
            "group": "agents.x-k8s.io",
            "names": {**names, "shortNames": ["sandbox"]},
            "scope": "Namespaced",
            "versions": [
                {
                    "name": name,
                    "served": True,
                    "storage": name == versions[0],
                    "schema": {"openAPIV3Schema": _sandbox(name)},
                    "subresources": {"status": {}},
                }
                for name in versions
            ],
        },
    }


def real_crd(name: str) -> Path | None:
    """A definition of a release of agent-sandbox, where AGENT_SANDBOX_CRDS names their directory."""
    directory = os.environ.get("AGENT_SANDBOX_CRDS")
    return Path(directory) / name if directory else None


def _sandbox(version: str) -> Schema:
    texts = {"type": "object", "additionalProperties": TEXT}
    container = _object("name", name=TEXT) | ANY
    pod = _object("containers", containers=_list(container)) | ANY
    template = _object("spec", metadata=_object(annotations=texts, labels=texts), spec=pod)
    mode = {
        "v1beta1": {"operatingMode": _one_of("Running", "Suspended") | {"default": "Running"}},
        "v1alpha1": {"replicas": {"type": "integer", "minimum": 0, "maximum": 1, "default": 1}},
    }[version]
    policy = _one_of("Delete", "Retain") | {"default": "Retain"}
    lifetime = {"shutdownPolicy": policy, "shutdownTime": TIME}
    spec = _object("podTemplate", podTemplate=template, service={"type": "boolean"}, **lifetime, **mode)
    condition = _object(
        *("lastTransitionTime", "message", "reason", "status", "type"),
        lastTransitionTime=TIME,
        message=TEXT,
        observedGeneration={"type": "integer", "minimum": 0},
        reason=TEXT | {"minLength": 1},
        status=_one_of("True", "False", "Unknown"),
        type=TEXT,
    )
    where = dict.fromkeys(("nodeName", "selector", "service", "serviceFQDN"), TEXT)
    status = _object(conditions=_list(condition), podIPs=_list(TEXT), **where)
    return _object("spec", spec=spec, status=status)


def _object(*required: str, **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties} | ({"required": list(required)} if required else {})


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _one_of(*values: str) -> Schema:
    return TEXT | {"enum": list(values)}
