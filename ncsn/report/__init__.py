"""Figures for people: `figures` makes bare pictures, `plots`, `search_plots` and `panels` make matplotlib figures."""
