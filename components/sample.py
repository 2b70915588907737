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
    from components import publish, publish_metrics, publish_pictures, task

    with task("sample", config=config, run=run, task_config=task_config) as (settings, name):
        from ncsn.runs.folder import run_folder
        from ncsn.runs.inputs import default_checkpoint
        from ncsn.steps import sample
        from ncsn.storage import read_bytes

        chosen = default_checkpoint(run_folder(settings, name), settings, last=checkpoint.metadata["uri"])
        result = sample.run(settings, run=name, checkpoint=chosen)
        publish(samples, result, display_name=f"{result.num_images:,} images", uri=result.uri)
        publish(sampled, result, display_name="checkpoint of the images", uri=result.checkpoint, framework="pytorch")
        publish_pictures(pictures, {"samples": read_bytes(result.grid), "level by level": read_bytes(result.strip)})
        publish_metrics(metrics, {"sample/num_images": result.num_images, "sample/nfe": result.nfe})
