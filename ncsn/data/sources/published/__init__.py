"""Datasets that others publish as Parquet files of encoded images."""
