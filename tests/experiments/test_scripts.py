"""The experiments run as scripts."""

import runpy
import sys
from pathlib import Path

import pytest

import experiments


@pytest.mark.parametrize(
    ("name", "option", "value"), [("sentiment", "weightin", "margin"), ("translation", "acceptanc", "topk:1")]
)
def test_an_error_is_one_line(monkeypatch, name, option, value):
    """Python prints the text of `sys.exit`, without a traceback, and returns 1."""
    monkeypatch.setattr(sys, "argv", [f"experiments.{name}", f"--{option}", value])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(Path(experiments.__file__).with_name(f"{name}.py")), run_name="__main__")
    message = str(ended.value.code)
    assert message.startswith(f"error: Unknown option '--{option}' (did you mean")
    assert "\n" not in message
