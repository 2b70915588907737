"""Noise conditional score networks."""
