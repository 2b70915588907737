"""The pipelines: `train` from raw images to a registered model, `sample` and `synthesize` from that to images."""

from typing import List  # noqa: UP035 - the form that KFP reads

from kfp import dsl, kubernetes

from components import IMAGE
from components.tasks import (
    evaluate,
    export,
    finish,
    ingest,
    open_model,
    register,
    report,
    sample,
    search,
    train,
    utility as compare,
)
from ncsn.environment import IMAGE_VARIABLE, KFP_RUN_ID, KFP_WORKFLOW, RUN_ID_LABEL
from ncsn.runs.steps import STEP_TABLE

ENVIRONMENT = "ncsn-environment"  # ConfigMap with addresses, in the namespace of the runs
# Ray's pods have all of it; KFP has no `envFrom`, so that each name is here. A key that is missing there stops no pod.
ADDRESSES = (
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_CA_BUNDLE"),
    *("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
    *("http_proxy", "https_proxy", "no_proxy"),
    *("MLFLOW_TRACKING_URI", "MLFLOW_S3_ENDPOINT_URL"),
    *("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD"),
    *("NCSN_KFP_UI", "NCSN_MLFLOW_UI", "NCSN_RAYJOB_TEMPLATE", "NCSN_STORE_PATIENCE", "NCSN_CACHE_DIR"),
)
CREDENTIALS = "ncsn-credentials"  # Secret, in the namespace of the runs
SECRETS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "RAY_AUTH_TOKEN",
    "NCSN_WEBHOOK_URL",
    "NCSN_WEBHOOK_SECRET",
)


def configured(task: dsl.PipelineTask, title: str, *, cached: bool = False) -> dsl.PipelineTask:
    """The same task, configured for a cluster.

    `cached` lets KFP take its outputs from an earlier run with the same arguments, artifacts and image.
    """
    task.set_display_name(title)
    task.set_caching_options(cached)
    task.container_spec.env = {IMAGE_VARIABLE: IMAGE}  # set_env_variable inspects the stack: 0.3 s for all tasks
    step = STEP_TABLE.get(task.name)
    if (
        step is not None and step.workers
    ):  # it may compute here; a container's own has 64 MB, and Ray would put its objects on the disk
        kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory")  # noqa: S108
    kubernetes.use_config_map_as_env(task, ENVIRONMENT, {name: name for name in ADDRESSES}, optional=True)
    kubernetes.use_secret_as_env(task, CREDENTIALS, {name: name for name in SECRETS}, optional=True)
    # Not arguments, which would give every run another cache key.
    for variable, label in ((KFP_RUN_ID, RUN_ID_LABEL), (KFP_WORKFLOW, "workflows.argoproj.io/workflow")):
        kubernetes.use_field_path_as_env(task, env_name=variable, field_path=f"metadata.labels['{label}']")
    return task


@dsl.pipeline(
    name="ncsn-train",
    display_name="NCSN: train and register",
    description="Trains a noise conditional score network (Song & Ermon 2019), samples from it, measures the "
    "samples and registers the model.",
)
def train_pipeline(config: str, run: str = "", content: str = "") -> None:
    """Train, sample, evaluate and register one experiment, and say how it ended, however it ended.

    If the config has a section `search`, better settings are searched first, and what was found is trained under the
    run's name with `-best` behind it. If it has a section `utility`, classifiers say whether the images help.

    Args:
        config: The whole experiment as canonical JSON (`ncsn show-config --json`) or YAML.
        run: Name of the run. The same name resumes; a name belongs to one experiment. Empty = the config's name and
            the id of this pipeline run.
        content: Fingerprint of the source's files, if known: KFP then takes the dataset from its cache.
    """
    finished = configured(finish(config=config, run=run), "Finish")
    with dsl.ExitHandler(finished, name="steps"):
        # Not cached unless `ncsn submit` knows the content: KFP sees the same config and not that images changed.
        ingested = configured(ingest(config=config, run=run, content=content), "Ingest images")
        dataset = ingested.outputs["dataset"]
        # A task and not a branch: only a task that reads the config knows whether it asks for a search.
        tuned = configured(search(config=config, run=run, dataset=dataset), "Search settings, if asked", cached=True)
        best_config, best_run = tuned.outputs["best_config"], tuned.outputs["best_run"]
        trained = configured(
            train(config=best_config, run=best_run, dataset=dataset), "Train score network", cached=True
        )
        # Not cached: `ncsn select` may have chosen another checkpoint since. The store has the images of this one.
        sampled = configured(
            sample(config=best_config, run=best_run, checkpoint=trained.outputs["checkpoint"]), "Sample images"
        )
        # Not cached: KFP takes the images of each run for new ones. The store has the results of the same images.
        evaluated = configured(
            evaluate(config=best_config, run=best_run, dataset=dataset, samples=sampled.outputs["samples"]),
            "Evaluate samples",
        )
        evaluation, checkpoint = evaluated.outputs["evaluation"], sampled.outputs["sampled"]
        # After the evaluation, which takes all workers too.
        compared = configured(
            compare(config=best_config, run=best_run, checkpoint=checkpoint, dataset=dataset).after(evaluated),
            "Compare classifiers, if asked",
        )
        # Not cached: the gate compares with the present champion. It reads in the store what classifiers say.
        registered = configured(
            register(config=best_config, run=best_run, checkpoint=checkpoint, evaluation=evaluation).after(compared),
            "Register model",
        )
        # After the gate, whose decision the page shows.
        configured(report(config=best_config, run=best_run, evaluation=evaluation).after(registered), "Write report")


@dsl.pipeline(
    name="ncsn-sample",
    display_name="NCSN: sample a registered model",
    description="Generates images from a model in MLflow's registry by any sampler, and measures them if asked.",
)
def sample_pipeline(
    model: str,
    root: str,
    registry: str = "",
    overrides: List[str] = [],  # noqa: UP006, B006 - a default of the form, which nothing changes
    evaluated: bool = False,  # noqa: FBT001, FBT002
) -> None:
    """Sample a registered model.

    Args:
        model: `models:/NAME@champion`, or another alias or version.
        root: Store in which the model is opened as a run, `<root>/runs/<name>-<version>-<digest>`, with its images.
        registry: Tracking server; empty = that of the cluster's environment.
        overrides: `a.b=value` for the config that is registered with the model, such as `sampling.num_images=1000`.
        evaluated: Measure the images too, for which the model's dataset is ingested if the store does not have it.
    """
    # Not cached: who is champion changes without any argument.
    opened = configured(open_model(model=model, registry=registry, root=root, overrides=overrides), "Open model")
    config, run = opened.outputs["config"], opened.outputs["run"]
    sampled = configured(sample(config=config, run=run, checkpoint=opened.outputs["checkpoint"]), "Sample images")
    with dsl.If(evaluated == True, name="if evaluated"):  # noqa: E712 - KFP records the comparison
        ingested = configured(ingest(config=config, run=run, content=""), "Ingest images")
        configured(
            evaluate(config=config, run=run, dataset=ingested.outputs["dataset"], samples=sampled.outputs["samples"]),
            "Evaluate samples",
        )


@dsl.pipeline(
    name="ncsn-synthesize",
    display_name="NCSN: a data set of generated images",
    description="Generates images from a model in MLflow's registry, leaves out copies of its training images, and "
    "writes the data set with a card.",
)
def synthesize_pipeline(
    model: str,
    root: str,
    registry: str = "",
    overrides: List[str] = [],  # noqa: UP006, B006
) -> None:
    """Write a data set of images of a registered model, without copies of its training images.

    Args:
        model: `models:/NAME@champion`, or another alias or version.
        root: Store in which the model is opened as a run, as in `sample_pipeline`.
        registry: Tracking server; empty = that of the cluster's environment.
        overrides: `a.b=value` for the config that is registered with the model, such as `export.per_class=500`.
    """
    opened = configured(open_model(model=model, registry=registry, root=root, overrides=overrides), "Open model")
    config, run = opened.outputs["config"], opened.outputs["run"]
    ingested = configured(ingest(config=config, run=run, content=""), "Ingest images")
    dataset, checkpoint = ingested.outputs["dataset"], opened.outputs["checkpoint"]
    configured(export(config=config, run=run, checkpoint=checkpoint, dataset=dataset), "Export images")
