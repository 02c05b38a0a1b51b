"""Harness of the experiments: arguments, data, arms, runs and reports."""
