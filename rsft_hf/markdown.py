"""Text of any origin made inert: for Markdown, and for a terminal."""

import html

import pandas


def markdown_table(frame: pandas.DataFrame) -> str:
    r"""Returns a table in Markdown, in which no cell is markup.

    Example:
        >>> print(markdown_table(pandas.DataFrame({"candidate": ["a|b *c* <i>"]})))
        | candidate |
        | --- |
        | a\|b \*c\* &lt;i&gt; |
    """
    escape = str.maketrans({one: f"\\{one}" for one in "\\`*_{}[]()#+-.!|~"} | {"\n": "<br>"})
    inert = lambda cell: html.escape(printable(str(cell)), quote=False).translate(escape)  # noqa: E731 - used once
    lines = [list(frame.columns), ["---"] * len(frame.columns), *(map(inert, row) for row in frame.values)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def printable(text: str) -> str:
    r"""Returns text that a terminal shows and does not obey: control characters and the like are written as escapes.

    Example:
        >>> print(printable("\x1b[2Jgone"))
        \x1b[2Jgone
    """
    return "".join(one if one.isprintable() or one in "\n\t" else repr(one)[1:-1] for one in text)
