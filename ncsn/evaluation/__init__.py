"""Metrics of images by the features of an extractor, and the extractors."""
