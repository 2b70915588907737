"""The manifests: one resource per file, known fields only, pods without root or secrets, and nothing that dangles."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
import yaml
from kuberay_rules import SECRET_NAME, house_errors, load_schemas, schema_errors
from kubernetes.client import models
from ray.serve.schema import ServeDeploySchema

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
KUSTOMIZATIONS = sorted(INFRA.glob("*/*/kustomization.yaml"))
RESOURCES = sorted(
    path for path in INFRA.glob("*/*/*.yaml") if path.name not in {"kustomization.yaml", "docker-compose.yaml"}
)
TEMPLATE = INFRA / "base" / "kuberay" / "rayjob.yaml"
SERVICE = INFRA / "overlays" / "serving" / "ray-service.yaml"
POD_KINDS = {"Deployment", "StatefulSet", "Job"}
RESTRICTED = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
# Resources of other projects, of which no schema is at hand: their fields are not checked here.
FOREIGN = {"PodMonitor", "ResourceFlavor", "ClusterQueue", "LocalQueue", "RayJob", "RayService"}


def name_of(path: Path) -> str:
    return str(path.relative_to(INFRA))


@cache
def load(path: Path) -> dict[str, Any]:
    (document,) = yaml.safe_load_all(path.read_text())
    return document


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


def references(node: Any, kind: str) -> Iterator[str]:
    """Names of the Secrets or ConfigMaps that a pod refers to."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in {f"{kind}Ref", f"{kind}KeyRef"}:
                yield value["name"]
            elif key == kind and isinstance(value, dict):
                yield value["secretName" if kind == "secret" else "name"]
            else:
                yield from references(value, kind)
    elif isinstance(node, list):
        for item in node:
            yield from references(item, kind)


@pytest.mark.parametrize("path", RESOURCES, ids=name_of)
def test_a_file_holds_one_resource_with_known_fields(path: Path) -> None:
    resource = load(path)
    assert resource["apiVersion"] and resource["metadata"]["name"]
    if resource["kind"] in FOREIGN:
        return
    version = resource["apiVersion"].rpartition("/")[2]
    model = f"{version[0].upper()}{version[1:]}{resource['kind']}"
    assert hasattr(models, model)
    assert list(unknown_fields(resource, model, "")) == []


def test_the_check_of_fields_finds_a_typo() -> None:
    wrong = {"spec": {"template": {"spec": {"containers": [{"name": "a", "readynessProbe": {}}]}}}}
    assert list(unknown_fields(wrong, "V1Deployment", "")) == [".spec.template.spec.containers[0].readynessProbe"]


@pytest.mark.parametrize("path", [path for path in RESOURCES if load(path)["kind"] in POD_KINDS], ids=name_of)
def test_pods_are_limited_unprivileged_and_hold_no_secret(path: Path) -> None:
    pod = load(path)["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
    for container in (*pod.get("initContainers", []), *pod["containers"]):
        assert container["resources"]["limits"].keys() >= {"cpu", "memory"}
        assert container["securityContext"] == RESTRICTED
        assert {"mountPath": "/tmp", "name": "tmp"} in container["volumeMounts"]
        assert re.search(r":v?\d+\.\d+", container["image"]), "the image is pinned"
        earlier: set[str] = set()
        for variable in container.get("env", []):
            file = variable.get("value", "").startswith("/")
            assert "valueFrom" in variable or file or not SECRET_NAME.search(variable["name"])
            assert set(re.findall(r"\$\((\w+)\)", variable.get("value", ""))) <= earlier, "it would stay as it stands"
            earlier.add(variable["name"])
        for argument in (*container.get("command", []), *container.get("args", [])):
            assert not re.search(r"\$\(\w*(SECRET|PASSWORD|KEY|TOKEN)", argument), (
                "arguments show in lists of processes"
            )


def test_the_janitor_is_small_unprivileged_and_never_twice_at_work() -> None:
    cron = load(INFRA / "base" / "janitor" / "cron-job.yaml")["spec"]
    assert (cron["concurrencyPolicy"], cron["jobTemplate"]["spec"]["backoffLimit"]) == ("Forbid", 0)
    assert max(cron["successfulJobsHistoryLimit"], cron["failedJobsHistoryLimit"]) <= 3
    pod = cron["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == load(INFRA / "base" / "janitor" / "service-account.yaml")["metadata"]["name"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    assert container["command"] == ["ncsn", "cleanup", "--jobs"] and "args" not in container
    assert container["resources"]["requests"].keys() == container["resources"]["limits"].keys() == {"cpu", "memory"}
    assert container["securityContext"] == RESTRICTED
    assert container["volumeMounts"] == [{"mountPath": "/tmp", "name": "tmp"}]


def test_every_resource_is_applied_or_an_example() -> None:
    listed = {
        (kustomization.parent / entry).resolve()
        for kustomization in KUSTOMIZATIONS
        for entry in load(kustomization)["resources"]
    }
    assert set(RESOURCES) - listed == {TEMPLATE, *INFRA.rglob("*.example.yaml")}
    assert all((path / "kustomization.yaml").is_file() for path in listed if path.is_dir())


def test_every_secret_that_a_pod_needs_has_an_example_and_every_address_a_service() -> None:
    everything = [load(path) for path in RESOURCES]
    examples = {load(path)["metadata"]["name"] for path in INFRA.rglob("*.example.yaml")}
    patches = [yaml.safe_load(patch["patch"]) for path in KUSTOMIZATIONS for patch in load(path).get("patches", [])]
    users = [*everything, *patches]
    assert {name for user in users for name in references(user, "secret")} == examples
    maps = {name for user in users for name in references(user, "configMap")}
    assert maps <= {resource["metadata"]["name"] for resource in everything if resource["kind"] == "ConfigMap"}
    services = {
        f"{resource['metadata']['name']}.ncsn-system:{port['port']}"
        for resource in everything
        if resource["kind"] == "Service"
        for port in resource["spec"]["ports"]
    }
    addresses = load(INFRA / "base" / "kuberay" / "environment.yaml")["data"].values()
    assert {address.removeprefix("http://") for address in addresses if "://" in address} <= services


def test_mlflow_and_its_upgrade_name_a_database_driver_that_is_there() -> None:
    """SQLAlchemy 2.1 takes psycopg 3 for postgresql:// without a driver, and the image has psycopg2."""
    pod = load(INFRA / "base" / "mlflow" / "deployment.yaml")["spec"]["template"]["spec"]
    texts = [str(pod["initContainers"]), str(pod["containers"]), (INFRA / "compose/docker-compose.yaml").read_text()]
    for text in texts:
        uris = set(re.findall(r"postgresql[+\w]*://[^\s'\"\]]+", text))
        assert len(uris) == 1
        url = sqlalchemy.make_url(uris.pop())
        assert url.get_dialect().import_dbapi().paramstyle
        assert url.password is None, "it would show in lists of processes"


def test_mlflow_serves_artifacts_itself_and_runs_no_jobs() -> None:
    """Its presigned URLs name an S3 of its own namespace; its job runners take 1.5 GB of memory."""
    (pod,) = load(INFRA / "base" / "mlflow" / "deployment.yaml")["spec"]["template"]["spec"]["containers"]
    server = {each["name"]: each.get("value") for each in pod["env"]}
    assert server["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    pods = load(INFRA / "base" / "kuberay" / "environment.yaml")["data"]
    assert server["MLFLOW_S3_ENDPOINT_URL"] == pods["AWS_ENDPOINT_URL"]
    compose = yaml.safe_load((INFRA / "compose" / "docker-compose.yaml").read_text())
    for environment in (pods, compose["services"]["ray-head"]["environment"]):
        assert environment["MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD"] == "false"
        assert environment["MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD"] == "false"


@pytest.mark.parametrize("path", [path for path in RESOURCES if load(path)["kind"] in POD_KINDS], ids=name_of)
def test_probes_are_patient_with_a_busy_node(path: Path) -> None:
    """A timeout of one second, the default, ended servers at work."""
    for container in load(path)["spec"]["template"]["spec"]["containers"]:
        probes = {kind: probe for kind, probe in container.items() if kind.endswith("Probe")}
        assert {"readinessProbe", "livenessProbe"} <= probes.keys()
        assert all(probe["timeoutSeconds"] >= 10 for probe in probes.values())
        assert probes["livenessProbe"]["failureThreshold"] >= 6


def test_servers_stop_change_and_keep_as_they_must() -> None:
    mlflow = load(INFRA / "base" / "mlflow" / "deployment.yaml")["spec"]
    assert mlflow["strategy"] == {"type": "Recreate"}, "the old server would hold on to a schema that is upgraded"
    store = load(INFRA / "base" / "object-store" / "stateful-set.yaml")["spec"]
    pod, (claim,) = store["template"]["spec"], store["volumeClaimTemplates"]
    assert pod["terminationGracePeriodSeconds"] > 2 * 46
    (megabytes,) = (arg.partition("=")[2] for arg in pod["containers"][0]["args"] if "volumeSizeLimitMB" in arg)
    gigabytes = int(claim["spec"]["resources"]["requests"]["storage"].removesuffix("Gi"))
    assert int(megabytes) * 20 < gigabytes * 1024, "one file more or less is not a quarter of the disk"


def test_of_the_object_store_s3_alone_is_open_and_nobody_is_its_administrator() -> None:
    """`tests/infra/test_servers.py` tries these arguments, and `tests/cluster_live` every port of the pod."""
    (container,) = load(INFRA / "base" / "object-store" / "stateful-set.yaml")["spec"]["template"]["spec"]["containers"]
    compose = yaml.safe_load((INFRA / "compose" / "docker-compose.yaml").read_text())
    server = compose["services"]["seaweedfs"]
    assert set(container["args"]) == set(server["command"])
    assert {each["name"]: each["value"] for each in container["env"]} == server["environment"]
    example = load(INFRA / "base" / "object-store" / "identities.example.yaml")["stringData"]["s3.json"]
    for text in (example, compose["configs"]["identities"]["content"]):
        for identity in json.loads(text)["identities"]:
            assert all(re.fullmatch(r"(Read|Write|List|Tagging):ncsn(/\w+/\*)?", each) for each in identity["actions"])


def test_no_file_holds_a_secret() -> None:
    for path in RESOURCES:
        resource = load(path)
        if resource["kind"] == "Secret":
            assert path.name.endswith(".example.yaml")
            assert all("REPLACE-ME" in value for value in resource["stringData"].values())


def test_the_launcher_has_the_same_few_rights_everywhere() -> None:
    role = load(INFRA / "base" / "rbac" / "launcher-role.yaml")
    aggregated = load(INFRA / "overlays" / "multi-user" / "launcher-cluster-role.yaml")
    assert role["rules"] == aggregated["rules"]
    assert not any({"secrets", "*"} & set(rule["resources"] + rule["verbs"]) for rule in role["rules"])
    binding = load(INFRA / "base" / "rbac" / "launcher-role-binding.yaml")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]


def test_the_template_is_a_valid_rayjob() -> None:
    template = load(TEMPLATE)
    assert house_errors(template) == []
    for schema in load_schemas("RayJob").values():
        assert schema_errors(template, schema) == []
    for schema in load_schemas("RayCluster").values():
        cluster = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "x"}}
        assert schema_errors(cluster | {"spec": template["spec"]["rayClusterSpec"]}, schema) == []


def test_the_service_is_a_valid_rayservice_whose_pods_are_as_those_of_a_rayjob() -> None:
    service = load(SERVICE)
    for schema in load_schemas("RayService").values():
        assert schema_errors(service, schema) == []
    cluster, template = service["spec"]["rayClusterConfig"], load(TEMPLATE)["spec"]
    as_a_job = {"rayClusterSpec": cluster, **{key: template[key] for key in template if key != "rayClusterSpec"}}
    assert house_errors({"spec": as_a_job}) == []
    wanted = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"]
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert application.args.keys() == {"model"}
    module, _, function = application.import_path.partition(":")
    assert callable(getattr(import_module(module), function))
    cpus = {each.name: each.num_replicas * each.ray_actor_options.num_cpus for each in application.deployments}
    assert cpus.keys() == {"Front", "Replica"}
    assert sum(cpus.values()) <= cluster["workerGroupSpecs"][0]["replicas"] * int(wanted)


def test_the_template_the_image_and_the_pins_agree() -> None:
    pin = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pin and load(TEMPLATE)["spec"]["rayClusterSpec"]["rayVersion"] == pin[1]
    assert load(SERVICE)["spec"]["rayClusterConfig"]["rayVersion"] == pin[1]
    images = {image for path in RESOURCES for image in re.findall(r"image: (ncsn-\S+)", path.read_text())}
    assert images == {f"ncsn-python:{VERSION}", f"ncsn-slim:{VERSION}"}
    renamed = load(INFRA / "image" / "kustomization.yaml")["images"]
    assert {each["name"]: each["newTag"] for each in renamed} == {
        "ncsn-python": VERSION,
        "ncsn-slim": f"{VERSION}-slim",
    }
    assert f"NCSN_IMAGE:-ncsn-python:{VERSION}" in (INFRA / "compose" / "docker-compose.yaml").read_text()


def test_the_image_carries_what_kuberay_needs() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert "COPY infra/base/kuberay/rayjob.yaml /etc/ncsn/rayjob.yaml" in dockerfile
    assert "NCSN_RAYJOB_TEMPLATE=/etc/ncsn/rayjob.yaml" in dockerfile
    assert re.search(r"apt-get install .*\bwget\b", dockerfile), "the probes of KubeRay call wget"
    assert "extras['server']" in dockerfile, "MLflow needs a driver for PostgreSQL"
    assert "extras['serve']" in dockerfile, "infra/overlays/serving runs in it"
    assert "'torch-fidelity'" in dockerfile, "evaluation.extractor: inception needs it, and nothing is installed later"
    assert re.search(r"^torch_fidelity==", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert re.search(r"^ARG BASE_IMAGE=python:\d+\.\d+\.\d+-", dockerfile, flags=re.MULTILINE), "the base is pinned"
    final = dockerfile.rpartition("\nFROM ")[2]
    assert "pip install" not in final
    user = re.search(r"^USER (\d+)$", final, flags=re.MULTILINE)
    pods = load(TEMPLATE)["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert user and int(user[1]) == pods["securityContext"]["runAsUser"]


def test_the_dashboard_asks_for_metrics_that_ray_has() -> None:
    dashboard = json.loads((INFRA / "base" / "monitoring" / "ncsn-dashboard.json").read_text())
    ray = find_spec("ray")
    assert ray and ray.origin
    panels = Path(ray.origin).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    known = "".join(path.read_text() for path in panels.glob("*.py"))
    for panel in dashboard["panels"]:
        for metric in re.findall(r"\bray_(\w+)", panel["targets"][0]["expr"]):
            assert f"ray_{metric}" in known, panel["title"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"]) >= 6


def test_compose_publishes_on_loopback_and_takes_secrets_from_the_environment() -> None:
    text = (INFRA / "compose" / "docker-compose.yaml").read_text()
    compose = yaml.safe_load(text)
    asked = set(re.findall(r"\$\{(\w+):\?", text))
    given = dict(re.findall(r"^(\w+)=(.*)$", (INFRA / "compose" / ".env.example").read_text(), flags=re.MULTILINE))
    assert asked == given.keys() and set(given.values()) == {"REPLACE-ME"}
    for name, service in compose["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service["image"].startswith("${NCSN_IMAGE") or re.search(r":v?\d+\.\d+", service["image"])
        once = name in {"upgrade-schema", "certificate", "bucket"}
        assert service["restart"] == ("on-failure" if once else "unless-stopped"), name
        for other in service.get("depends_on", {}):
            assert other in compose["services"]
        for key, value in service.get("environment", {}).items():
            assert not SECRET_NAME.search(key) or value.startswith(("${", "/"))
