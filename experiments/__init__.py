"""Comparisons of arms over seeds: the evidence behind the tables of README and docs."""
