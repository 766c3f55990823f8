"""k8s/base is valid, safe, and fits what Baton's parts really take: flags, ports, health names, drain."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from baton.config import DecodeConfig, RouterConfig, WorkerConfig, parse, to_argv
from baton.rpc import LIVENESS
from tests.house.manifests import BASE, ROOT, Manifest, container, name_of, of_kind, render

PARTS: dict[str, type[Any]] = {"router": RouterConfig, "prefill": WorkerConfig, "decode": DecodeConfig}
SETTINGS = of_kind("ConfigMap")["baton-settings"]["data"]
DEPLOYMENTS = of_kind("Deployment")


@pytest.fixture(params=PARTS)
def part(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pod(part: str) -> Manifest:
    return dict(DEPLOYMENTS[f"baton-{part}"]["spec"]["template"]["spec"])


@pytest.mark.parametrize("manifest", render(), ids=name_of)
def test_every_manifest_keeps_the_schema_of_kubernetes(manifest: Manifest) -> None:
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_a_misspelt_field_would_be_found() -> None:
    manifest = of_kind("Service")["baton-router"]
    manifest["spec"]["selectors"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_the_base_has_all_parts() -> None:
    assert set(DEPLOYMENTS) == {"baton-router", "baton-prefill", "baton-decode", "baton-redis"}
    assert set(of_kind("Service")) == {"baton-router", "baton-redis"}
    assert all(m["metadata"].get("namespace") == "baton" for m in render() if m["kind"] != "Namespace")


def test_every_file_of_the_base_is_listed() -> None:
    listed = set(yaml.safe_load((BASE / "kustomization.yaml").read_text())["resources"])
    assert listed == {p.name for p in BASE.glob("*.yaml")} - {"kustomization.yaml"}


def test_the_rendering_is_what_kubectl_makes() -> None:
    done = _kustomize(BASE)
    made = {name_of(m): m for m in yaml.safe_load_all(done)}
    assert made == {name_of(m): m for m in render()}


@pytest.mark.parametrize("overlay", sorted(p.parent for p in (ROOT / "k8s").glob("overlays/*/kustomization.yaml")))
def test_every_overlay_renders_and_keeps_the_schema(overlay: Path) -> None:
    for manifest in yaml.safe_load_all(_kustomize(overlay)):
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_the_cpu_demo_serves_the_model_in_the_box() -> None:
    overlay = yaml.safe_load((ROOT / "k8s/overlays/cpu-demo/kustomization.yaml").read_text())
    (patch,) = (p["patch"] for p in overlay["patches"] if p["target"]["kind"] == "ConfigMap")
    settings = dict(SETTINGS)
    for step in yaml.safe_load(patch):
        assert step["op"] == "remove", "the one step that this test knows"
        del settings[step["path"].removeprefix("/data/")]
    for cls in PARTS.values():
        parsed = parse(cls, [], prog="baton", environ=settings)
        model = parsed.model if cls is RouterConfig else parsed.model.model
        assert model == "", "workers say what they serve, and the router asks them"


def test_every_variable_is_a_setting_of_its_part_with_a_value_that_it_takes(part: str) -> None:
    one = container(DEPLOYMENTS[f"baton-{part}"])
    assert one["args"] == [part]
    stand_ins = {"fieldRef": "10.0.0.1", "resourceFieldRef": "4"}
    own = {e["name"]: e.get("value") or stand_ins[next(iter(e["valueFrom"]))] for e in one["env"]}
    parsed = parse(PARTS[part], [], prog="baton", environ=SETTINGS | own)
    options = _variables(PARTS[part])
    for name, value in own.items():
        if name.startswith("BATON_"):
            assert name in options, f"baton {part} has no setting for {name}"
            assert str(_setting(parsed, name)) == value


def test_every_common_setting_is_some_parts(part: str) -> None:
    known = set().union(*(_variables(cls) for cls in PARTS.values()))
    assert set(SETTINGS) <= known
    parsed = parse(PARTS[part], [], prog="baton", environ=SETTINGS)
    assert parsed.discovery.redis_url == SETTINGS["BATON_REDIS_URL"]
    assert parsed.host == "0.0.0.0"


def test_probes_ask_a_port_that_is_there_for_a_health_name_that_is_there(part: str) -> None:
    one = container(DEPLOYMENTS[f"baton-{part}"])
    ports = {p["name"]: p["containerPort"] for p in one["ports"]}
    environ = {e["name"]: e.get("value") for e in one["env"]}
    for name, port in ports.items():
        assert environ[f"BATON_{name.upper()}_PORT"] == str(port)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert one[probe]["grpc"]["port"] == ports["grpc"]
        assert one[probe]["grpc"].get("service", "") in ("", LIVENESS)
    assert one["livenessProbe"]["grpc"]["service"] == LIVENESS, "a part that drains must not be killed for it"
    assert "service" not in one["readinessProbe"]["grpc"]


def test_metrics_are_scraped_where_they_are_served(part: str) -> None:
    template = DEPLOYMENTS[f"baton-{part}"]["spec"]["template"]
    ports = {p["name"]: p["containerPort"] for p in container(DEPLOYMENTS[f"baton-{part}"])["ports"]}
    served = ports["http" if part == "router" else "metrics"]
    assert template["metadata"]["annotations"]["prometheus.io/port"] == str(served)


def test_a_pod_has_time_to_drain(part: str, pod: Manifest) -> None:
    asleep = container(DEPLOYMENTS[f"baton-{part}"])["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = float(SETTINGS["BATON_DRAIN_SECONDS"])
    assert pod["terminationGracePeriodSeconds"] >= asleep + drain + 5


def test_no_variable_comes_in_by_a_service_link() -> None:
    """A service `baton-grpc` would put BATON_GRPC_PORT=tcp://… where a setting is looked for."""
    for deployment in DEPLOYMENTS.values():
        assert deployment["spec"]["template"]["spec"]["enableServiceLinks"] is False


def test_workers_tell_others_the_pods_own_address(part: str) -> None:
    sources = {e["name"]: e.get("valueFrom", {}) for e in container(DEPLOYMENTS[f"baton-{part}"])["env"]}
    if part != "router":
        assert sources["BATON_ADVERTISE_HOST"] == {"fieldRef": {"fieldPath": "status.podIP"}}
        assert sources["BATON_THREADS"]["resourceFieldRef"]["containerName"] == part


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_every_pod_keeps_the_restricted_standard(name: str) -> None:
    pod = DEPLOYMENTS[name]["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["serviceAccountName"] in of_kind("ServiceAccount")
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    one = container(DEPLOYMENTS[name])
    assert one["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert one["resources"]["requests"].keys() == {"cpu", "memory"}
    assert "memory" in one["resources"]["limits"]
    assert not one["image"].endswith(":latest")
    assert ":" in one["image"]


def test_the_pods_user_is_the_images(pod: Manifest) -> None:
    user = f"USER {pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}\n"
    assert user in (ROOT / "Dockerfile").read_text()


def test_what_is_written_to_is_mounted(part: str, pod: Manifest) -> None:
    one = container(DEPLOYMENTS[f"baton-{part}"])
    mounts = {m["mountPath"]: m["name"] for m in one["volumeMounts"]}
    assert set(mounts.values()) == {v["name"] for v in pod["volumes"]}
    environ = {e["name"]: e.get("value", "") for e in one["env"]}
    for name in ("HOME", "HF_HOME"):
        assert any(environ[name] == path or environ[name].startswith(f"{path}/") for path in mounts), name


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_selectors_select_their_own_pods_and_no_others(name: str) -> None:
    labels = DEPLOYMENTS[name]["spec"]["template"]["metadata"]["labels"]
    assert DEPLOYMENTS[name]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    for other, deployment in DEPLOYMENTS.items():
        selector = deployment["spec"]["selector"]["matchLabels"]
        assert (selector.items() <= labels.items()) == (other == name)


@pytest.mark.parametrize("service", of_kind("Service").values(), ids=name_of)
def test_services_lead_to_ports_of_the_pods_that_they_select(service: Manifest) -> None:
    (target,) = (
        d
        for d in DEPLOYMENTS.values()
        if service["spec"]["selector"].items() <= d["spec"]["template"]["metadata"]["labels"].items()
    )
    ports = {p["name"]: p["containerPort"] for p in container(target)["ports"]}
    for port in service["spec"]["ports"]:
        assert ports[port["targetPort"]] == port["port"]


def test_the_redis_that_is_asked_is_the_one_that_is_there() -> None:
    (port,) = of_kind("Service")["baton-redis"]["spec"]["ports"]
    assert SETTINGS["BATON_REDIS_URL"] == f"redis://baton-redis:{port['port']}/0"


def _kustomize(folder: Path) -> str:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("there is no kubectl here; the plain rendering is checked in its place")
    return subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=True).stdout


def _variables(cls: type[Any]) -> set[str]:
    words = [word.partition("=")[0] for word in to_argv(cls())]
    return {"BATON_" + w.removeprefix("--no-").removeprefix("--").replace("-", "_").upper() for w in words}


def _setting(parsed: Any, variable: str) -> Any:
    option = "--" + variable.removeprefix("BATON_").lower().replace("_", "-")
    return next(word.partition("=")[2] for word in to_argv(parsed) if word.partition("=")[0] == option)
