"""A config's network, its checkpoints, and images from it."""
