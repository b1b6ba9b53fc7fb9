"""The examples in the docstrings of the public API run as pasted, on the CPU."""

import inspect
import operator
import re
import textwrap

import pytest

import triton_lstm

NOT_OURS = {"LSTM.flatten_parameters", "LSTM.register_forward_hook"}  # torch.nn.Module's, which have its meaning

NEEDS = {"Gradients.frame": "pandas", "Gradients.plot": "matplotlib", "Gradients.log": "tensorboard"}


def public():
    """The public names, and the methods of public classes."""
    for name in triton_lstm.__all__:
        yield name
        value = getattr(triton_lstm, name)
        methods = vars(value) if inspect.isclass(value) else {}
        ours = [m for m in methods.values() if inspect.isfunction(m) and m.__module__.startswith("triton_lstm")]
        yield from (f"{name}.{method.__name__}" for method in ours if method.__doc__ and method.__name__[0] != "_")


def example_of(name):
    """The indented block after "Example::", without prompts; None if there is none."""
    doc = inspect.getdoc(operator.attrgetter(name)(triton_lstm)) + "\n"
    found = re.search(r"^Example::\n((?: +.*\n|\n)+)", doc, re.MULTILINE)
    return found and re.sub(r"^(>>>|\.\.\.) ?", "", textwrap.dedent(found[1]), flags=re.MULTILINE)


@pytest.mark.parametrize("name", sorted({*public()} - NOT_OURS))
def test_example_runs(name, tmp_path, monkeypatch):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.chdir(tmp_path)
    code = example_of(name)
    assert code is not None and "import triton_lstm" in code
    exec(compile(code, f"example of {name}", "exec"), {})
