"""The manifests: known fields only, pods without root, rights or secrets, and nothing that dangles."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import ray
import sqlalchemy
import yaml
from kubernetes.client import models
from manifests import api_server_errors, names_of, within

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|KEY|CREDENTIAL", re.IGNORECASE)


@cache
def load(path: Path) -> dict[str, Any]:
    (document,) = yaml.safe_load_all(path.read_text())
    return document


KUSTOMIZATIONS = {path: load(path) for path in sorted(INFRA.glob("*/*/kustomization.yaml"))}
RESOURCES = {
    str(path.relative_to(INFRA)): load(path)
    for path in sorted(INFRA.glob("*/*/*.yaml"))
    if path.name not in {"kustomization.yaml", "docker-compose.yaml"}
}
COMPOSE = load(INFRA / "compose" / "docker-compose.yaml")
TEMPLATE, SERVICE = RESOURCES["base/kuberay/rayjob.yaml"], RESOURCES["overlays/serving/ray-service.yaml"]
ENVIRONMENT = RESOURCES["base/kuberay/environment.yaml"]["data"]
RAY_NODE = {"ray.io/is-ray-node": "yes"}  # the label of a pod of a RayCluster
MLFLOW = RESOURCES["base/mlflow/deployment.yaml"]["spec"]
STORE = RESOURCES["base/object-store/stateful-set.yaml"]["spec"]
RESTRICTED = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
EVICTION = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
# Resources of other projects, which the client has no models of: CRDs' schemas check those of KubeRay.
FOREIGN = {"PodMonitor", "ResourceFlavor", "ClusterQueue", "LocalQueue", "RayJob", "RayService"}


def templates(resource: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Those of pods."""
    found = (value for _, value in within(resource, "template", "submitterPodTemplate"))
    yield from (each for each in found if "containers" in each.get("spec", {}))


PODS = [template for resource in RESOURCES.values() for template in templates(resource)]


def unknown_fields(value: Any, kind: str, path: str) -> Iterator[str]:
    """Fields that the API type of this name does not have, by the Kubernetes client's own models."""
    if match := re.fullmatch(r"list\[(.*)\]", kind):
        for index, item in enumerate(value):
            yield from unknown_fields(item, match[1], f"{path}[{index}]")
    elif isinstance(value, dict) and (model := getattr(models, kind, None)) is not None:
        types = {model.attribute_map[name]: type_ for name, type_ in model.openapi_types.items()}
        for key, below in value.items():
            if key not in types:
                yield f"{path}.{key}"
            else:
                yield from unknown_fields(below, types[key], f"{path}.{key}")


@pytest.mark.parametrize("name", RESOURCES)
def test_a_file_holds_one_resource_with_known_fields(name: str) -> None:
    resource = RESOURCES[name]
    assert api_server_errors(resource) == []
    if resource["kind"] not in FOREIGN:
        version = resource["apiVersion"].rpartition("/")[2]
        model = f"{version[0].upper()}{version[1:]}{resource['kind']}"
        assert hasattr(models, model) and list(unknown_fields(resource, model, "")) == []


@pytest.mark.parametrize("name", [name for name, each in RESOURCES.items() if any(templates(each))])
def test_pods_are_limited_unprivileged_and_hold_no_secret(name: str) -> None:
    """`tests/cluster_live` has the restricted pod security of Kubernetes, and fewer of these rules."""
    for pod in (each["spec"] for each in templates(RESOURCES[name])):
        assert pod["automountServiceAccountToken"] is (name == "base/janitor/cron-job.yaml")
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in (*pod.get("initContainers", []), *pod["containers"]):
            assert container["resources"]["limits"].keys() == {"cpu", "memory"}
            assert container["securityContext"] == RESTRICTED
            assert {"mountPath": "/tmp", "name": "tmp"} in container["volumeMounts"]
            assert re.search(r":v?\d+\.\d+", container["image"]), "the image is pinned"
            earlier: set[str] = set()
            for variable in container.get("env", []):
                file = variable.get("value", "").startswith("/")
                assert "valueFrom" in variable or file or not SECRET_NAME.search(variable["name"])
                assert set(re.findall(r"\$\((\w+)\)", variable.get("value", ""))) <= earlier, "it would stay as it is"
                earlier.add(variable["name"])
            for argument in (*container.get("command", []), *container.get("args", [])):
                assert not re.search(r"\$\(\w*(SECRET|PASSWORD|KEY|TOKEN)", argument), "lists of processes show it"
            probes = {key: probe for key, probe in container.items() if key.endswith("Probe")}
            assert all(probe["timeoutSeconds"] >= 10 for probe in probes.values()), (
                "probes of one second have ended busy servers"
            )
            assert probes.get("livenessProbe", {"failureThreshold": 6})["failureThreshold"] >= 6


@pytest.mark.parametrize("cluster", [TEMPLATE["spec"]["rayClusterSpec"], SERVICE["spec"]["rayClusterConfig"]])
def test_rays_pods_stay_where_they_are_have_shared_memory_and_their_head_computes_nothing(cluster: Any) -> None:
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert (head["rayStartParams"]["num-cpus"], head["rayStartParams"]["num-gpus"]) == ("0", "0")
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"] < 2147483647
    for pod in (head["template"], workers["template"]):
        assert pod["metadata"]["annotations"].items() >= EVICTION.items()
        assert pod["metadata"]["labels"]["sidecar.istio.io/inject"] == "false"
        (shm,) = (each["emptyDir"] for each in pod["spec"]["volumes"] if each["name"] == "shm")
        assert shm["medium"] == "Memory" and shm["sizeLimit"]
        mounts = {each["mountPath"]: each["name"] for each in pod["spec"]["containers"][0]["volumeMounts"]}
        assert mounts["/dev/shm"] == "shm"


def test_workers_go_at_once_and_the_cluster_later_however_it_ended() -> None:
    """After activeDeadlineSeconds jobStatus stays RUNNING, so a rule for it alone keeps the GPUs (KubeRay 1.7.0)."""
    spec = TEMPLATE["spec"]
    seconds = {"DeleteWorkers": {}, "DeleteSelf": {}}
    for rule in spec["deletionStrategy"]["deletionRules"]:
        end, (_, after) = rule["condition"].items()
        seconds[rule["policy"]][end] = after
    ends = {("jobStatus", "SUCCEEDED"), ("jobStatus", "FAILED"), ("jobDeploymentStatus", "Failed")}
    assert seconds["DeleteWorkers"] == dict.fromkeys(ends, 0) and seconds["DeleteSelf"].keys() == ends
    assert spec["activeDeadlineSeconds"] and spec["preRunningDeadlineSeconds"]


def test_every_resource_is_applied_or_an_example_and_no_example_holds_a_secret() -> None:
    paths = {(path.parent / entry).resolve() for path, each in KUSTOMIZATIONS.items() for entry in each["resources"]}
    examples = {INFRA / name for name in RESOURCES if name.endswith(".example.yaml")}
    assert {INFRA / name for name in RESOURCES} - paths == {INFRA / "base" / "kuberay" / "rayjob.yaml", *examples}
    secrets = {INFRA / name: each["stringData"] for name, each in RESOURCES.items() if each["kind"] == "Secret"}
    assert secrets.keys() == examples
    assert all("REPLACE-ME" in value for data in secrets.values() for value in data.values())


def test_everything_that_is_named_is_there() -> None:
    """Secrets, ConfigMaps and accounts of pods, addresses, ports and labels of what a Service leads to."""
    patches = [yaml.safe_load(patch["patch"]) for each in KUSTOMIZATIONS.values() for patch in each.get("patches", [])]
    there = {(each["kind"], each["metadata"]["name"]) for each in RESOURCES.values()}
    everything = [list(RESOURCES.values()), patches]
    assert {("Secret", name) for name in names_of(everything, "secret")} == {pair for pair in there if "Secret" in pair}
    accounts = {("ServiceAccount", name) for _, name in within(everything, "serviceAccountName")}
    assert accounts | {("ConfigMap", name) for name in names_of(everything, "configMap")} <= there
    addresses = set()
    for service in (each for each in RESOURCES.values() if each["kind"] == "Service"):
        pod = next(pod for pod in PODS if service["spec"]["selector"].items() <= pod["metadata"]["labels"].items())
        ports = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
            addresses.add(f"http://{service['metadata']['name']}.ncsn-system:{port['port']}")
        assert {each["port"] for _, each in within(pod, "httpGet", "tcpSocket")} <= ports.keys()
    assert {address for address in ENVIRONMENT.values() if "://" in address} <= addresses


def test_a_network_policy_admits_these_to_open_ports_and_nobody_else() -> None:
    """From namespaces with a label, pods with a label, to ports. Prometheus and KubeRay's operator are not ours."""
    admitted: dict[str, set[str]] = {}
    for policy in (each for each in RESOURCES.values() if each["kind"] == "NetworkPolicy"):
        name, spec = policy["metadata"]["name"], policy["spec"]
        selected = spec["podSelector"]["matchLabels"].items()
        chosen = [pod for pod in PODS if selected <= (pod["metadata"]["labels"] | RAY_NODE).items()]
        assert chosen and spec["policyTypes"] == ["Ingress"], name
        admitted[name] = set()
        for rule in spec["ingress"]:
            ports = {each["port"] for each in rule.get("ports", [])}
            assert ports <= {port for _, port in within(chosen, "containerPort")}, name
            for peer in rule["from"]:
                selectors = [peer[kind].get("matchLabels", {}) for kind in sorted(peer)]
                labels = [f"{key}={value}" for each in selectors for key, value in each.items()]
                anywhere = ["anywhere"] if peer.get("namespaceSelector") == {} else []
                admitted[name].add(" ".join([*anywhere, *labels, *map(str, ports)]))
    pipelines, part = "ncsn.dev/pipelines=true", "app.kubernetes.io/part-of=ncsn"
    operator = "anywhere app.kubernetes.io/component=kuberay-operator"
    assert admitted == {
        "mlflow": {f"{pipelines} 5000", "ncsn.dev/ingress=true 5000"},
        "ncsn-ray": {part, f"{operator} 8265"},
        "ncsn-ray-metrics": {"anywhere app.kubernetes.io/name=prometheus 8080"},
        "ncsn-serving": {f"{pipelines} 8000", f"{operator} 8000"},
        "postgres": {"app.kubernetes.io/name=mlflow 5432", "app.kubernetes.io/name=mlflow-backup 5432"},
        "seaweedfs": {f"{pipelines} 8333", f"{part} 8333"},
    }


def test_mlflow_has_a_database_driver_serves_artifacts_itself_and_runs_no_jobs() -> None:
    """Its presigned URLs name an S3 of its own namespace; its job runners take 1.5 GB of memory."""
    assert MLFLOW["strategy"] == {"type": "Recreate"}, "the old server would hold on to a schema that is upgraded"
    pod = MLFLOW["template"]["spec"]
    dump, upgrade = pod["initContainers"]
    assert dump["name"] == "dump", "before the schema changes for good"
    services = COMPOSE["services"]
    assert services["dump"]["command"][0].replace("$$", "$") == dump["args"][0]
    assert services["upgrade-schema"]["depends_on"] == {"dump": {"condition": "service_completed_successfully"}}
    for text in map(str, (upgrade, pod["containers"], COMPOSE)):
        (uri,) = set(re.findall(r"postgresql[+\w]*://[^\s'\"\]]+", text))
        url = sqlalchemy.make_url(uri)  # SQLAlchemy 2.1 takes psycopg 3 without a driver, and the image has psycopg2
        assert url.get_dialect().import_dbapi().paramstyle
        assert url.password is None, "it would show in lists of processes"
    server = {each["name"]: each.get("value") for each in pod["containers"][0]["env"]}
    assert server["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert server["MLFLOW_S3_ENDPOINT_URL"] == ENVIRONMENT["AWS_ENDPOINT_URL"]
    for environment in (ENVIRONMENT, COMPOSE["services"]["ray-head"]["environment"]):
        assert environment["MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD"] == "false"
        assert environment["MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD"] == "false"


def test_of_the_object_store_s3_alone_is_open_and_nobody_is_its_administrator() -> None:
    """`tests/cluster_live/test_infra.py` tries every port of the pod, and what a key may do."""
    (container,), server = STORE["template"]["spec"]["containers"], COMPOSE["services"]["seaweedfs"]
    assert set(container["args"]) == set(server["command"])
    assert {each["name"]: each["value"] for each in container["env"]} == server["environment"]
    example = RESOURCES["base/object-store/identities.example.yaml"]["stringData"]["s3.json"]
    for text in (example, COMPOSE["configs"]["identities"]["content"]):
        for identity in json.loads(text)["identities"]:
            assert all(re.fullmatch(r"(Read|Write|List|Tagging):ncsn(/\w+/\*)?", each) for each in identity["actions"])
    (megabytes,) = (arg.partition("=")[2] for arg in container["args"] if "volumeSizeLimitMB" in arg)
    storage = STORE["volumeClaimTemplates"][0]["spec"]["resources"]["requests"]["storage"]
    assert int(megabytes) * 20 < int(storage.removesuffix("Gi")) * 1024, "one file is not a quarter of the disk"
    assert STORE["template"]["spec"]["terminationGracePeriodSeconds"] > 2 * 46


def test_the_launcher_has_the_same_few_rights_everywhere() -> None:
    role = RESOURCES["base/rbac/launcher-role.yaml"]
    assert role["rules"] == RESOURCES["overlays/multi-user/launcher-cluster-role.yaml"]["rules"]
    assert RESOURCES["base/rbac/launcher-role-binding.yaml"]["roleRef"]["name"] == role["metadata"]["name"]


def test_the_template_the_image_and_the_pins_agree() -> None:
    pin = re.search(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pin and {value for _, value in within([TEMPLATE, SERVICE], "rayVersion")} == {pin[1]}
    images = {str(image) for _, image in within(list(RESOURCES.values()), "image") if str(image).startswith("ncsn-")}
    assert images == {f"ncsn-python:{VERSION}", f"ncsn-slim:{VERSION}"}
    renamed = {each["name"]: each["newTag"] for each in load(INFRA / "image" / "kustomization.yaml")["images"]}
    assert renamed == {"ncsn-python": VERSION, "ncsn-slim": f"{VERSION}-slim"}
    assert f"NCSN_IMAGE:-ncsn-python:{VERSION}" in COMPOSE["x-ncsn"]["image"]


def test_the_image_has_what_its_users_need_and_no_address_of_an_index() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert "COPY infra/base/kuberay/rayjob.yaml /etc/ncsn/rayjob.yaml" in dockerfile
    assert "NCSN_RAYJOB_TEMPLATE=/etc/ncsn/rayjob.yaml" in dockerfile
    assert re.search(r"apt-get install .*\bwget\b", dockerfile), "the probes of KubeRay call wget"
    final = dockerfile.rpartition("\nFROM ")[2]
    assert "pip install" not in final
    user = re.search(r"^USER (\d+)$", final, flags=re.MULTILINE)
    assert user and {int(user[1])} == {value for _, value in within(TEMPLATE, "runAsUser")}


def test_the_service_names_our_application() -> None:
    (application,) = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])["applications"]
    module, _, function = application["import_path"].partition(":")
    assert callable(getattr(import_module(module), function))
    assert {each["name"] for each in application["deployments"]} == {"Front", "Replica"}


def test_the_dashboard_asks_for_metrics_that_ray_has_on_a_port_that_its_pods_have() -> None:
    dashboard = json.loads((INFRA / "base" / "monitoring" / "ncsn-dashboard.json").read_text())
    panels = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    known = "".join(path.read_text() for path in panels.glob("*.py"))
    for panel in dashboard["panels"]:
        for metric in re.findall(r"\bray_(\w+)", panel["targets"][0]["expr"]):
            assert f"ray_{metric}" in known, panel["title"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"]) >= 6
    monitor = RESOURCES["base/monitoring/pod-monitor.yaml"]["spec"]
    for pod in templates(TEMPLATE["spec"]["rayClusterSpec"]):
        assert monitor["selector"]["matchLabels"].items() <= (pod["metadata"]["labels"] | RAY_NODE).items()
        ports = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
        assert {ports[endpoint["port"]] for endpoint in monitor["podMetricsEndpoints"]} == {8080}


def test_compose_publishes_on_loopback_and_takes_secrets_from_the_environment() -> None:
    text = (INFRA / "compose" / "docker-compose.yaml").read_text()
    asked = set(re.findall(r"\$\{(\w+):\?", text))
    given = dict(re.findall(r"^(\w+)=(.*)$", (INFRA / "compose" / ".env.example").read_text(), flags=re.MULTILINE))
    assert asked == given.keys() and set(given.values()) == {"REPLACE-ME"}
    for name, service in COMPOSE["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service["image"].startswith("${NCSN_IMAGE") or re.search(r":v?\d+\.\d+", service["image"])
        once = name in {"dump", "upgrade-schema", "certificate", "bucket"}
        assert service["restart"] == ("on-failure" if once else "unless-stopped"), name
        assert COMPOSE["services"].keys() >= set(service.get("depends_on", {}))
        for key, value in service.get("environment", {}).items():
            assert not SECRET_NAME.search(key) or value.startswith(("${", "/"))
