"""Samplers, and the noise levels that they visit."""
