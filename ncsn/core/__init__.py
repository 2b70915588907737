"""Noise levels, losses, networks and samplers, on torch and numpy alone."""
