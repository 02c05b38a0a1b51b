"""The equations of a worked solution, by which two solutions are the same: text enters, a tuple of strings leaves."""

import re

_NUMBER = r"(?:\d+(?:\.\d+)?|\.\d+)%?"
# At most a few signs and brackets, so that a line of dashes is not tried from each of its dashes to its end.
_TERM = rf"(?:[-(]\s*){{0,6}}{_NUMBER}(?:\s*\))*"
_EXPRESSION = rf"{_TERM}(?:\s*[-+*/^]\s*{_TERM})*"
_EQUATION = re.compile(rf"(?<![\w.]){_EXPRESSION}(?:\s*=\s*{_EXPRESSION})+")
_ANNOTATION = re.compile(r"<<(.*?)>>")
# The signs for times, middle dot, divided by, minus and en dash; currencies say nothing of the reasoning.
_SPELLINGS = str.maketrans("\u00d7\u00b7\u00f7\u2212\u2013", "**/--", "$\u20ac\u00a3")


def solution_equations(text: str) -> tuple[str, ...] | None:
    r"""Returns the equations of a solution in their order, without spaces, or None if it has none.

    Two solutions with the same equations reason alike, whatever their words: RFT keeps one of them, Yuan et al. 2023,
    arXiv:2308.01825. Where calculations are annotated as in GSM8K, `<<48/2=24>>`, only the annotations are read.
    Currency signs and thousands separators are dropped. An equation with words between its numbers, "3 apples + 2
    apples = 5", is not seen.

    Args:
        text: A worked solution.

    Returns:
        The key for `Deduplicate(key=solution_equations)`; None, which is never a duplicate, without equations.

    Example:
        >>> solution_equations("She sold 48 / 2 = 24 clips in May, and 48 + 24 = $72 in all.")
        ('48/2=24', '48+24=72')
        >>> solution_equations("She sold 48/2 = <<48/2=24>>24 clips.")
        ('48/2=24',)
    """
    annotations = _ANNOTATION.findall(text)
    source = "\n".join(annotations) if annotations else text
    source = re.sub(r"(?<=\d),(?=\d{3}\b)", "", source.translate(_SPELLINGS))
    source = re.sub(r"(?<=\d)\s+[xX]\s+(?=[\d(.])", "*", source)
    equations = tuple(_unwrap(re.sub(r"\s+", "", found)) for found in _EQUATION.findall(source))
    return equations or None


def _unwrap(equation: str) -> str:
    """The equation without brackets of the sentence around it: "(2+3=5)"."""
    left = equation.split("=", 1)[0]
    while left.count("(") > left.count(")"):
        left, equation = left[1:], equation[1:].removesuffix(")")
    return equation
