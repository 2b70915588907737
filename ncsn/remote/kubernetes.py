"""The Kubernetes API as this package uses it: RayJobs, their pods, and what the caller may do.

A call is repeated while the API server is unreachable; a refusal is an error of one line.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

import urllib3
import yaml
from kubernetes import client, config, watch
from kubernetes.client.exceptions import ApiException

from ncsn.errors import UserError
from ncsn.remote.backend import PATIENCE_SECONDS, Conflict, Unavailable, keep_asking, message_of

Resource = dict[str, Any]

GROUP, VERSION, RAYJOBS = "ray.io", "v1", "rayjobs"
KUEUE_VERSIONS = ("v1beta2", "v1beta1")
TIMEOUTS = (5, 30)

_IN_CLUSTER_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_UNAVAILABLE = {429, 500, 502, 503, 504}
_LOST_LOG = "unable to retrieve container logs"  # what the kubelet answers for one that is gone


class KubernetesApi:
    """One namespace of one cluster; None = that of this pod, or of the current kubeconfig context.

    A call is repeated for `patience` seconds. `timeouts` are the seconds to connect and to answer, of one request.
    """

    def __init__(
        self,
        namespace: str | None = None,
        *,
        patience: float = PATIENCE_SECONDS,
        timeouts: tuple[float, float] = TIMEOUTS,
    ) -> None:
        configuration, default_namespace = _load_configuration()
        configuration.retries = False
        self.server: str = configuration.host
        self.namespace = namespace or default_namespace
        self.own_namespace = default_namespace
        self.patience, self._timeouts = patience, timeouts
        self._client = client.ApiClient(configuration)
        self._custom = client.CustomObjectsApi(self._client)
        self._core = client.CoreV1Api(self._client)
        self._authorization = client.AuthorizationV1Api(self._client)
        self._rayjobs = (GROUP, VERSION, self.namespace, RAYJOBS)
        self._workflows = ("argoproj.io", "v1alpha1", self.namespace, "workflows")

    def rayjob_schema(self) -> Resource:
        """OpenAPI schema of the RayJob that is installed, which every authenticated user may read."""
        path = f"/openapi/v3/apis/{GROUP}/{VERSION}"
        document = self._call("get", path, self._raw, path, "GET", missing=None)
        for schema in (document or {}).get("components", {}).get("schemas", {}).values():
            kinds = schema.get("x-kubernetes-group-version-kind", [])
            if {"group": GROUP, "version": VERSION, "kind": "RayJob"} in kinds:
                return cast("Resource", schema)
        raise UserError(
            self.server,
            f"the cluster knows no RayJob {GROUP}/{VERSION}",
            hint="install the KubeRay operator: helm install kuberay-operator kuberay/kuberay-operator --version 1.7.0",
        )

    def create_rayjob(self, manifest: Resource) -> None:
        """Create it; raises `Conflict` if there is one of that name."""
        self._call("create", RAYJOBS, self._custom.create_namespaced_custom_object, *self._rayjobs, manifest)

    def rayjob(self, name: str) -> Resource | None:
        """The RayJob, or None."""
        return self._get(RAYJOBS, self._custom.get_namespaced_custom_object, *self._rayjobs, name)

    def list_rayjobs(self, labels: str) -> list[Resource]:
        """The RayJobs with these labels; none in a cluster without KubeRay."""
        list_all = self._custom.list_namespaced_custom_object
        return self._list(RAYJOBS, list_all, *self._rayjobs, label_selector=labels, missing=None)

    def annotate_rayjob(self, name: str, annotations: dict[str, str]) -> None:
        """Set annotations; without effect if it is gone."""
        path = f"/apis/{GROUP}/{VERSION}/namespaces/{self.namespace}/{RAYJOBS}/{name}"
        body = {"metadata": {"annotations": annotations}}
        self._call("patch", RAYJOBS, self._raw, path, "PATCH", body, missing=None)

    def delete_rayjob(self, name: str) -> None:
        """Delete it and, in the background, its cluster; without effect if it is gone."""
        body = client.V1DeleteOptions(propagation_policy="Background")
        delete = self._custom.delete_namespaced_custom_object
        self._call("delete", RAYJOBS, delete, *self._rayjobs, name, body=body, missing=None)

    def wait_for_change(self, rayjob: Resource, *, seconds: float) -> None:
        """Return when the RayJob is no longer as it was read, and after `seconds` at the latest.

        The caller reads the RayJob again: a watch only says when to look. So a version that is gone (410), a watch that
        the server cuts, and a server that is unavailable are not handled here.
        """
        started = time.monotonic()
        try:
            events = watch.Watch().stream(
                self._custom.list_namespaced_custom_object,
                *self._rayjobs,
                field_selector=f"metadata.name={rayjob['metadata']['name']}",
                resource_version=rayjob["metadata"]["resourceVersion"],
                timeout_seconds=max(1, round(seconds)),
                _request_timeout=(self._timeouts[0], seconds + 5),
            )
            with closing(events):  # not by a finalizer, where Python drops the exit of a signal's handler
                next(events, None)
        except (ApiException, urllib3.exceptions.HTTPError, json.JSONDecodeError):
            time.sleep(max(0.0, min(1.0, seconds) - (time.monotonic() - started)))

    def pods(self, labels: str) -> list[Resource]:
        """The pods with these labels, oldest first."""
        pods = self._list("pods", self._core.list_namespaced_pod, self.namespace, label_selector=labels)
        return sorted(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")))

    def pod(self, name: str) -> Resource | None:
        """The pod, or None."""
        return self._get("pods", self._core.read_namespaced_pod, name, self.namespace)

    def workflow(self, name: str) -> Resource | None:
        """The Argo Workflow that runs a KFP run, or None."""
        get = self._custom.get_namespaced_custom_object
        return self._get("workflows.argoproj.io", get, *self._workflows, name)

    def workflows(self, labels: str) -> list[Resource]:
        """The Argo Workflows with these labels."""
        list_all = self._custom.list_namespaced_custom_object
        return self._list("workflows.argoproj.io", list_all, *self._workflows, label_selector=labels)

    def events(self, name: str) -> list[Resource]:
        """The events of the object of this name, oldest first."""
        where = f"involvedObject.name={name}"
        events = self._list("events", self._core.list_namespaced_event, self.namespace, field_selector=where)
        return sorted(events, key=time_of_event)

    def create_config_map(self, manifest: Resource) -> None:
        """Create it; raises `Conflict` if there is one of that name."""
        self._call("create", "configmaps", self._core.create_namespaced_config_map, self.namespace, manifest)

    def config_maps(self, labels: str) -> list[Resource]:
        """The ConfigMaps with these labels."""
        return self._list("configmaps", self._core.list_namespaced_config_map, self.namespace, label_selector=labels)

    def delete_config_map(self, name: str) -> None:
        """Delete it; without effect if it is gone."""
        self._call("delete", "configmaps", self._core.delete_namespaced_config_map, name, self.namespace, missing=None)

    def nodes(self) -> list[Resource]:
        """The cluster's nodes, which an account of one namespace seldom may see."""
        return self._list("nodes", self._core.list_node)

    def local_queue(self, name: str) -> Resource | None:
        """Kueue's LocalQueue of this namespace, or None, by the newest API version that the cluster serves."""
        get = self._custom.get_namespaced_custom_object
        for version in KUEUE_VERSIONS:
            where = ("kueue.x-k8s.io", version, self.namespace, "localqueues", name)
            if (found := self._get("localqueues.kueue.x-k8s.io", get, *where)) is not None:
                return found
        return None

    @contextmanager
    def follow_log(self, pod: str, *, since_seconds: int | None) -> Iterator[Iterator[bytes]]:
        """Pieces of the pod's log, each line with its time, until the container ends or the stream is cut."""
        options: dict[str, Any] = {"follow": True, "timestamps": True, "_preload_content": False}
        options |= {"_request_timeout": (self._timeouts[0], 300)}
        options |= {} if since_seconds is None else {"since_seconds": since_seconds}
        read = self._core.read_namespaced_pod_log
        response = self._call("get", "pods/log", read, pod, self.namespace, **options)
        try:
            yield response.stream(amt=None, decode_content=True)
        finally:
            response.close()

    def last_words(self, pod: str, container: str, *, lines: int) -> list[str]:
        """The last lines of a container that has ended; empty if its log is gone."""
        read = self._core.read_namespaced_pod_log
        options = {"container": container, "tail_lines": lines}
        try:
            text = self._call("get", "pods/log", read, pod, self.namespace, **options, missing="")
        except UserError:  # HTTP 400: it has not started
            return []
        return [line for line in str(text).splitlines() if not line.startswith(_LOST_LOG)]

    def allowed(self, verb: str, resource: str) -> bool:
        """Whether the caller may do this here, for example `create` on `rayjobs.ray.io` or `get` on `pods/log`."""
        name, _, group = resource.partition(".")
        plural, _, subresource = name.partition("/")
        attributes = {"namespace": self.namespace, "verb": verb, "group": group, "resource": plural}
        body = {"spec": {"resourceAttributes": attributes | ({"subresource": subresource} if subresource else {})}}
        create = self._authorization.create_self_subject_access_review
        return bool(self._call("create", "selfsubjectaccessreviews", create, body).status.allowed)

    def _raw(self, path: str, method: str, body: Any = None, **options: Any) -> Any:
        headers = {"Accept": "application/json", "Content-Type": "application/merge-patch+json"}
        return self._client.call_api(
            path,
            method,
            header_params=headers,
            body=body,
            response_type="object",
            auth_settings=["BearerToken"],
            _return_http_data_only=True,
            **options,
        )

    def _get(self, resource: str, function: Callable[..., Any], *args: Any) -> Resource | None:
        return cast("Resource | None", self._read("get", resource, function, *args, missing=None))

    def _list(self, resource: str, function: Callable[..., Any], *args: Any, **options: Any) -> list[Resource]:
        listed = self._read("list", resource, function, *args, **options)
        return cast("list[Resource]", listed["items"] if listed else [])

    def _read(self, verb: str, resource: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """The JSON of the answer: the client's own models refuse what they do not expect."""

        def read(*args: Any, **options: Any) -> Any:
            return json.loads(function(*args, _preload_content=False, **options).data)

        return self._call(verb, resource, read, *args, **options)

    def _call(self, verb: str, resource: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call until the API server answers. With `missing` given, that stands for 404."""
        has_missing, missing = "missing" in options, options.pop("missing", None)
        options.setdefault("_request_timeout", self._timeouts)

        def call() -> Any:
            try:
                return function(*args, **options)
            except ApiException as error:
                if error.status == 404 and has_missing:
                    return missing
                if error.status == 409 and verb == "create":
                    raise Conflict from None
                if error.status not in _UNAVAILABLE:
                    raise self._refusal(verb, resource, error) from None
                raise Unavailable(f"HTTP {error.status}") from None
            except (urllib3.exceptions.HTTPError, json.JSONDecodeError) as error:  # the second is a cut answer
                raise Unavailable(type(error).__name__) from None

        return keep_asking(call, server=f"the Kubernetes API at {self.server}", seconds=self.patience)

    def _refusal(self, verb: str, resource: str, error: ApiException) -> Exception:
        message = message_of(error)
        if error.status == 403:
            return PermissionError(
                f"forbidden: this account lacks the verb {verb!r} on {resource} in namespace {self.namespace!r}; "
                "`kubectl apply --kustomize infra/base/rbac` grants it, in a profile infra/overlays/multi-user "
                f"({message})"
            )
        if error.status == 401:
            return PermissionError(f"the Kubernetes API at {self.server} does not accept the credentials: {message}")
        return UserError(
            self.server, f"the Kubernetes API refuses to {verb} {resource} (HTTP {error.status}): {message}"
        )


def _load_configuration() -> tuple[client.Configuration, str]:
    configuration = client.Configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)
        return configuration, _IN_CLUSTER_NAMESPACE.read_text().strip()
    except config.ConfigException:
        file = os.environ.get("KUBECONFIG")
    try:
        config.load_kube_config(config_file=file, client_configuration=configuration)
        _, context = config.list_kube_config_contexts(config_file=file)
    except (config.ConfigException, yaml.YAMLError, ValueError) as error:
        raise UserError(
            "KUBECONFIG",
            f"no Kubernetes cluster: this is not a pod, and the kubeconfig is not usable ({error})",
            hint="set it to the kubeconfig of a cluster",
            value=file or "~/.kube/config",
        ) from None
    return configuration, context["context"].get("namespace", "default")


def time_of_event(event: Resource) -> str:
    """When it was last seen, in ISO 8601; a recorder fills either the older field or the newer ones."""
    seen = event.get("lastTimestamp") or (event.get("series") or {}).get("lastObservedTime")
    return str(seen or event.get("eventTime") or "")
