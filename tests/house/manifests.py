"""Reads k8s/base without kubectl: a list of resources, one namespace and one label are all that it may use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "k8s" / "base"
CLUSTER_WIDE = {"Namespace"}


def render(base: Path = BASE) -> list[Manifest]:
    """What `kubectl kustomize` makes of it, in no particular order."""
    kustomization = yaml.safe_load((base / "kustomization.yaml").read_text())
    known = {"apiVersion", "kind", "namespace", "labels", "resources"}
    assert kustomization.keys() <= known, f"render knows {sorted(known)} only"
    rendered: list[Manifest] = []
    for name in kustomization["resources"]:
        for manifest in yaml.safe_load_all((base / name).read_text()):
            metadata = manifest["metadata"]
            for label in kustomization["labels"]:
                metadata["labels"] = metadata.get("labels", {}) | label["pairs"]
            if manifest["kind"] not in CLUSTER_WIDE:
                metadata["namespace"] = kustomization["namespace"]
            rendered.append(manifest)
    return rendered


def name_of(manifest: Manifest) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def of_kind(kind: str) -> dict[str, Manifest]:
    return {m["metadata"]["name"]: m for m in render() if m["kind"] == kind}


def container(deployment: Manifest) -> Manifest:
    (only,) = deployment["spec"]["template"]["spec"]["containers"]
    return dict(only)
