"""Metrics on feature extractors, and the extractors."""
