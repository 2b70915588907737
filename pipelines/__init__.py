"""KFP pipelines made of the components. This file loads no kfp, which `ncsn doctor` can do without."""

from ncsn.errors import UserError

ENDPOINT = "KF_PIPELINES_ENDPOINT"
TOKEN = "NCSN_KFP_TOKEN"  # noqa: S105 - the name of a variable


class KfpError(UserError):
    """The Kubeflow Pipelines API cannot be used as configured."""


class KfpRefusalError(KfpError):
    """The API refuses the credentials."""
