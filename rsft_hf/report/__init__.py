"""Report of a run: one HTML file with its curves, its rows or candidates, and its suspected label errors."""

from rsft_hf.report.page import write_report
from rsft_hf.report.run import Run, read_run

__all__ = ["Run", "read_run", "write_report"]
