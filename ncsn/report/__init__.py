"""Plots, pictures and texts about a run, and the HTML page of the report."""
