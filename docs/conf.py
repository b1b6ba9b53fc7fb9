"""Sphinx: `make docs` builds the pages of docs/, perf/ and the top level, and the reference from docstrings."""

import inspect
from typing import Any

import torch
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import triton_lstm

project = "triton_lstm"
author = "the contributors to triton_lstm"
version = release = triton_lstm.__version__

# The source folder is that of the checkout, so that links between all of its pages are checked
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md", "perf/*.md", "perf/results/*/report.md"]
exclude_patterns = [".*", "build", "dist", "runs", "tests", "triton_lstm"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

default_role = "code"  # single backticks in docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings give shapes and dtypes, which types do not
autodoc_preserve_defaults = True
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"triton_lstm {version}"
html_math_renderer = "mathml"  # no script from a network
html_show_sphinx = html_copy_source = False
nitpicky = True
nitpick_ignore_regex = [("py:.*", "(?!triton_lstm).*")]  # PyTorch's and Python's, whose inventories would be downloads


def _mathml(self: Any, node: nodes.math | nodes.math_block) -> None:
    block = isinstance(node, nodes.math_block)
    self.body.append(tex2mathml(node.astext(), as_block=block))
    raise nodes.SkipNode


def _public_names() -> set[str]:
    """All that the package exports, and the methods and properties of its classes."""
    found = {f"triton_lstm.{name}" for name in triton_lstm.__all__}
    for name in triton_lstm.__all__:
        if inspect.isclass(value := getattr(triton_lstm, name)):
            for key, member in vars(value).items():
                inherited = member is getattr(torch.nn.LSTM, key, None)
                if not key.startswith("_") and not inherited and (callable(member) or isinstance(member, property)):
                    found.add(f"triton_lstm.{name}.{key}")
    return found


def _check_reference(app: Sphinx, env: BuildEnvironment) -> None:
    """A public name without a docstring, or that no page of the reference lists, fails the build."""
    missing = _public_names() - set(env.get_domain("py").objects)
    for name in sorted(missing):
        logging.getLogger(__name__).warning("%s has no docstring, or is on no page of docs/reference", name)


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", inline_renderers=(_mathml, None), block_renderers=(_mathml, None))
    app.connect("env-check-consistency", _check_reference)
