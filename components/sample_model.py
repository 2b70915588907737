"""Images from a registered model, wherever it was trained."""

from typing import List, NamedTuple  # noqa: UP035 - the form that KFP reads

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def sample_model(
    model: str,
    registry: str,
    root: str,
    overrides: List[str],  # noqa: UP006
    samples: dsl.Output[dsl.Dataset],
    pictures: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
) -> NamedTuple("Sampled", [("config", str), ("run", str)]):  # type: ignore[valid-type]
    """Generate the images that are missing in the model's folder; hand on a config and a run to measure them with."""
    from components import publish, publish_metrics, publish_pictures
    from ncsn.config import to_json
    from ncsn.progress import Progress
    from ncsn.storage import read_bytes
    from ncsn.tools import models
    from ncsn.tracking.client import server_uri

    server = server_uri(registry or None, root=root)
    result = models.sample_model(model, registry=server, root=root, overrides=overrides, progress=Progress())
    publish(samples, result, display_name=f"{result.num_images:,} images", uri=result.uri, model=result.model)
    publish_pictures(pictures, {"samples": read_bytes(result.grid)})
    publish_metrics(metrics, {"sample/num_images": result.num_images, "sample/nfe": result.nfe})
    config, run = models.run_of_images(result, root=root, overrides=overrides)
    return (to_json(config), run)
