"""Recipes: one straight file per task, each run as a script or imported as `recipes.<name>`."""
