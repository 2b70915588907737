"""Step 3: images from the EMA weights."""

from kfp import dsl

from components import IMAGE
from components.task_config import PASSED_ON


@dsl.component(base_image=IMAGE, install_kfp_package=False, task_config_passthroughs=list(PASSED_ON))
def sample(
    config: str,
    run: str,
    checkpoint: dsl.Input[dsl.Model],
    samples: dsl.Output[dsl.Dataset],
    sampled: dsl.Output[dsl.Model],
    pictures: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
    task_config: dsl.TaskConfig,
) -> None:
    """Generate images by the configured sampler, from what `ncsn select` chose since, if it did."""
    from components import publish, publish_metrics, publish_pictures, run_task
    from ncsn.storage import read_bytes

    result = run_task("sample", config, run, checkpoint=checkpoint, task_config=task_config)
    publish(samples, result, display_name=f"{result.num_images:,} images", uri=result.uri)
    publish(sampled, result, display_name="checkpoint of the images", uri=result.checkpoint, framework="pytorch")
    publish_pictures(pictures, {"samples": read_bytes(result.grid), "level by level": read_bytes(result.strip)})
    publish_metrics(metrics, {"sample/num_images": result.num_images, "sample/nfe": result.nfe})
