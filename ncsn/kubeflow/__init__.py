"""A run on Kubeflow Pipelines: what tasks do around their steps, its end, and the janitor for what ends silently."""
