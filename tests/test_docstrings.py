"""The examples in the docstrings of the public API run as pasted, on the CPU."""

import inspect
import re
import textwrap

import pytest

import triton_lstm


def example_of(name):
    """The indented block after "Example::", without prompts; None if there is none."""
    found = re.search(r"^Example::\n((?: +.*\n|\n)+)", inspect.getdoc(getattr(triton_lstm, name)) + "\n", re.MULTILINE)
    return found and re.sub(r"^(>>>|\.\.\.) ?", "", textwrap.dedent(found[1]), flags=re.MULTILINE)


@pytest.mark.parametrize("name", triton_lstm.__all__)
def test_example_runs(name):
    code = example_of(name)
    assert code is not None and "import triton_lstm" in code
    exec(compile(code, f"example of {name}", "exec"), {})
