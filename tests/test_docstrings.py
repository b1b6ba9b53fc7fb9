"""The examples in the docstrings of the public API run as pasted, on the CPU."""

import inspect
import operator
import re
import textwrap

import pytest

import triton_lstm

NOT_OURS = {"LSTM.flatten_parameters", "LSTM.register_forward_hook"}  # torch.nn.Module's, which have its meaning


def public():
    """The public names, and the methods of public classes."""
    for name in triton_lstm.__all__:
        yield name
        methods = vars(getattr(triton_lstm, name)) if inspect.isclass(getattr(triton_lstm, name)) else {}
        yield from (f"{name}.{of}" for of, m in methods.items() if inspect.isfunction(m) and of[0] != "_" and m.__doc__)


def example_of(name):
    """The indented block after "Example::", without prompts; None if there is none."""
    doc = inspect.getdoc(operator.attrgetter(name)(triton_lstm)) + "\n"
    found = re.search(r"^Example::\n((?: +.*\n|\n)+)", doc, re.MULTILINE)
    return found and re.sub(r"^(>>>|\.\.\.) ?", "", textwrap.dedent(found[1]), flags=re.MULTILINE)


@pytest.mark.parametrize("name", sorted({*public()} - NOT_OURS))
def test_example_runs(name, tmp_path, monkeypatch):
    if name == "Gradients.log":
        pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    code = example_of(name)
    assert code is not None and "import triton_lstm" in code
    exec(compile(code, f"example of {name}", "exec"), {})
