"""A run on Kubeflow Pipelines: what its tasks do around their steps, its end, and the janitor for what ends silently."""
