"""Everything that is not a pipeline step: first configs, planning, images from registered models."""
