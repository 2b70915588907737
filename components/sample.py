"""Step 3: images from the EMA weights."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def sample(
    config: str,
    run: str,
    checkpoint: dsl.Input[dsl.Model],
    samples: dsl.Output[dsl.Dataset],
    pictures: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Generate images by the configured sampler."""
    from components import experiment, publish, publish_metrics, publish_pictures
    from ncsn.steps import sample
    from ncsn.storage import read_bytes

    settings, name = experiment(config, run)
    result = sample.run(settings, run=name, checkpoint=checkpoint.metadata["uri"])
    publish(samples, result, uri=result.uri)
    publish_pictures(pictures, {"samples": read_bytes(result.grid), "level by level": read_bytes(result.strip)})
    publish_metrics(metrics, {"sample/num_images": result.num_images, "sample/nfe": result.nfe})
