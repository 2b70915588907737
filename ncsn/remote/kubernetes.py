"""The Kubernetes API as this package uses it: JSON of a few kinds of objects, logs, and what the caller may do.

A call is repeated while the API server is unreachable; a refusal is an error of one line.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import yaml
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from ncsn.environment import POD_NAMESPACE
from ncsn.errors import UserError
from ncsn.remote.backend import PATIENCE_SECONDS, keep_asking, message_of

Resource = dict[str, Any]

INSTALL_KUBERAY = "helm install kuberay-operator kuberay/kuberay-operator --version 1.7.0"

# Resource -> its API. The client's own models are not used: they refuse what they do not expect.
_APIS = {"rayjobs": "apis/ray.io/v1", "workflows": "apis/argoproj.io/v1alpha1"}
_CORE = "api/v1"
_NAME = re.compile("[a-z0-9][a-z0-9.-]*")
_METHODS = {"create": "POST", "patch": "PATCH", "delete": "DELETE"}  # of a verb; the others read
_ENDED = {"Succeeded", "Failed", "Error"}  # of an Argo Workflow
_LOST_LOG = "unable to retrieve container logs"  # what the kubelet answers for one that is gone


class Conflict(Exception):
    """The name is taken."""


class KubernetesApi:
    """One namespace of one cluster; None = that of this pod, or of the current kubeconfig context.

    A call is repeated for `patience` seconds. `timeouts` are the seconds to connect and to answer, of one request.
    """

    in_pod = False  # whether this process is in a pod of the cluster

    def __init__(
        self,
        namespace: str | None = None,
        *,
        patience: float = PATIENCE_SECONDS,
        timeouts: tuple[float, float] = (5, 30),
    ) -> None:
        configuration = client.Configuration()
        try:
            config.load_incluster_config(client_configuration=configuration)
            self.own_namespace, self.in_pod = POD_NAMESPACE.read_text().strip(), True
        except config.ConfigException:
            file = os.environ.get("KUBECONFIG")
            try:
                config.load_kube_config(config_file=file, client_configuration=configuration)
                _, context = config.list_kube_config_contexts(config_file=file)
            except (config.ConfigException, yaml.YAMLError, ValueError) as error:
                reason = f"no Kubernetes cluster: this is not a pod, and the kubeconfig is not usable ({error})"
                hint = "set it to the kubeconfig of a cluster"
                raise UserError("KUBECONFIG", reason, hint=hint, value=file or "~/.kube/config") from None
            self.own_namespace = context["context"].get("namespace", "default")
        configuration.retries = False
        self.server: str = configuration.host
        self.namespace = namespace or self.own_namespace
        self._patience, self._timeouts = patience, timeouts
        self._client = client.ApiClient(configuration)

    def get(self, resource: str, name: str) -> Resource | None:
        if not _NAME.fullmatch(name):  # of a note or an owner, where others write it: it would lead to another object
            return None
        found: Resource | None = self._call("get", resource, self._path(resource, name), missing=None)
        return found

    def find(self, resource: str, *, labels: str = "", fields: str = "") -> list[Resource]:
        """The objects with these labels and fields, oldest first; none where the cluster knows no such resource."""
        query = {"labelSelector": labels, "fieldSelector": fields}
        listed = self._call("list", resource, self._path(resource), query=query, missing={"items": []})
        return sorted(listed["items"], key=lambda found: str(found["metadata"].get("creationTimestamp", "")))

    def wait(self, resource: str, found: Resource, *, seconds: int) -> None:
        """Return when the object is no longer as it was found, after `seconds`, or when the connection is lost."""
        name, version = (found["metadata"][field] for field in ("name", "resourceVersion"))
        # The first event is the object as it is, so that what happened before the watch is not missed.
        query = {"watch": "true", "fieldSelector": f"metadata.name={name}", "timeoutSeconds": str(seconds)}

        def first_change(response: Any) -> None:
            with response:
                events = (json.loads(line)["object"]["metadata"] for line in response)
                next((each for each in events if each.get("resourceVersion") != version), None)

        with suppress(ConnectionError):  # the next look asks again, and sees what was missed
            self._call("watch", resource, self._path(resource), query=query, parse=first_change, patience=0)

    def create(self, resource: str, manifest: Resource) -> Resource:
        """The object as it was created; raises `Conflict` if there is one of that name."""
        created: Resource = self._call("create", resource, self._path(resource), body=manifest)
        return created

    def patch(self, resource: str, name: str, change: Resource) -> None:
        """Merge into the object; None takes a field away."""
        self._call("patch", resource, self._path(resource, name), body=change)

    def delete(self, resource: str, name: str, *, uid: str | None = None) -> None:
        """Delete the object and, in the background, what it owns; without effect if it is gone.

        Another object of this name stays if `uid` is given.
        """
        body: Resource = {"propagationPolicy": "Background"}
        if uid is not None:
            body["preconditions"] = {"uid": uid}
        with suppress(Conflict):
            self._call("delete", resource, self._path(resource, name), body=body, missing=None)

    def events(self, name: str) -> list[Resource]:
        """The events of the object of this name, oldest first."""
        return sorted(self.find("events", fields=f"involvedObject.name={name}"), key=time_of_event)

    def rayjob_fields(self) -> Resource:
        """The schema of `spec` of the RayJob that is installed, by field; every authenticated user may read it."""
        document = self._call("get", "rayjobs", "/openapi/v3/apis/ray.io/v1", missing={})
        for schema in document.get("components", {}).get("schemas", {}).values():
            if "RayJob" in [kind["kind"] for kind in schema.get("x-kubernetes-group-version-kind", [])]:
                fields: Resource = schema.get("properties", {}).get("spec", {}).get("properties", {})
                return fields
        raise UserError(self.server, "the cluster knows no RayJob ray.io/v1", hint=INSTALL_KUBERAY)

    def allowed(self, verb: str, resource: str, name: str = "") -> bool:
        """Whether the caller may do this here, for example `create` on `rayjobs.ray.io` or `get` on `pods/log`.

        With `name` to the one object of that name.
        """
        path, _, group = resource.partition(".")
        plural, _, subresource = path.partition("/")
        attributes = {"namespace": self.namespace, "verb": verb, "group": group, "resource": plural, "name": name}
        body = {"spec": {"resourceAttributes": attributes | ({"subresource": subresource} if subresource else {})}}
        reviews = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        return bool(self._call("create", "selfsubjectaccessreviews", reviews, body=body)["status"]["allowed"])

    def read_log(self, pod: str, **query: str) -> list[str]:
        """Lines of the pod's log; empty if it is gone or its container has not started (HTTP 400)."""
        try:
            path = self._path("pods", pod, "log")
            text = self._call("get", "pods/log", path, query=query, parse=lambda log: log.data.decode(errors="replace"))
        except UserError:
            return []
        return [line for line in text.split("\n") if line and not line.startswith(_LOST_LOG)]

    def _path(self, resource: str, *below: str) -> str:
        return "/".join((f"/{_APIS.get(resource, _CORE)}/namespaces/{self.namespace}/{resource}", *below))

    def _call(
        self,
        verb: str,
        resource: str,
        path: str,
        *,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        patience: float = math.inf,
        parse: Callable[[Any], Any] = lambda response: json.loads(response.data),
        **missing: Any,
    ) -> Any:
        """The answer of the API server, asked until it gives one. With `missing` given, that stands for 404."""
        content = "application/merge-patch+json" if verb == "patch" else "application/json"

        def ask() -> Any:
            response = self._client.call_api(
                path,
                _METHODS.get(verb, "GET"),
                query_params=[(name, value) for name, value in (query or {}).items() if value],
                header_params={"Accept": "application/json", "Content-Type": content},
                body=body,
                auth_settings=["BearerToken"],
                _return_http_data_only=True,
                _preload_content=False,
                _request_timeout=self._timeouts,
            )
            return parse(response)

        try:
            return keep_asking(
                ask, server=f"the Kubernetes API at {self.server}", seconds=min(self._patience, patience)
            )
        except ApiException as error:
            status, message = error.status, message_of(error)
        if status == 404 and missing:
            return missing["missing"]
        if status == 409:
            raise Conflict
        if status == 403:
            raise PermissionError(
                f"this account lacks the verb {verb!r} on {resource} in namespace {self.namespace!r}; `kubectl apply "
                f"--kustomize infra/base/rbac` grants it, in a profile infra/overlays/multi-user ({message})"
            )
        if status == 401:
            raise PermissionError(f"the Kubernetes API at {self.server} does not accept the credentials: {message}")
        hint = INSTALL_KUBERAY if status == 404 and resource == "rayjobs" else ""
        raise UserError(self.server, f"refuses to {verb} {resource} (HTTP {status}): {message}", hint=hint)


def time_of_event(event: Resource) -> str:
    """When it was last seen, in ISO 8601; a recorder fills either the older field or the newer ones."""
    seen = event.get("lastTimestamp") or (event.get("series") or {}).get("lastObservedTime")
    return str(seen or event.get("eventTime") or "")


def owner_of(owned: Resource) -> Resource:
    """The reference to the Argo Workflow that owns it; empty without."""
    owners = owned["metadata"].get("ownerReferences", [])
    return next((owner for owner in owners if owner["kind"] == "Workflow"), {})


def was_stopped(workflow: Resource | None) -> bool:
    """Whether a person ended the Workflow, or deleted it.

    KFP's Terminate sets `spec.activeDeadlineSeconds` to 0, Argo's own stop and terminate set `spec.shutdown`.
    """
    if workflow is None or "deletionTimestamp" in workflow["metadata"]:
        return True
    spec = workflow.get("spec", {})
    return spec.get("activeDeadlineSeconds") == 0 or bool(spec.get("shutdown"))


def is_over(workflow: Resource | None) -> bool:
    """Whether no pod of the Workflow still runs."""
    return workflow is None or workflow.get("status", {}).get("phase") in _ENDED


def is_ending(workflow: Resource | None) -> bool:
    """Whether the Workflow has ended or is being ended; one that is gone has ended."""
    return is_over(workflow) or was_stopped(workflow)
