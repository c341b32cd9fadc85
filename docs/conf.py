"""The site that `make docs` builds: Markdown pages and the docstrings of pyreg, by Sphinx.

Everything that a page needs lies in the folder that is built, search and formulas too: formulas become MathML, which
browsers render without a script.
"""

from __future__ import annotations

import collections.abc
import re
import sys
from typing import Any

import torch
import torch.distributed
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import pyreg

# Modules import these for type checkers alone; here they make annotations readable.
for module in [module for name, module in sys.modules.items() if name.startswith("pyreg.")]:
    vars(module).setdefault("dist", torch.distributed)
    vars(module).setdefault("Callable", collections.abc.Callable)

project = "pyreg"
author = "the pyreg authors"
copyright = author
version = release = pyreg.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx_copybutton"]

html_theme = "furo"
html_title = "pyreg"
html_static_path = ["_static"]
html_css_files = ["pyreg.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_copyright = False

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a file that is included may begin with any level of heading

# Names of pyreg are links, and one that leads nowhere fails the build. Those of other projects are plain.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(torch|collections)\..*|Tensor")]

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autosummary_generate = False
napoleon_custom_sections = ["Shape", "Gradient"]
napoleon_use_rtype = False


def _mathml(formula: str) -> str:
    """With the thin space between a function's name and its argument that LaTeX puts there, but before a bracket."""
    return re.sub(r"<mo>&ApplyFunction;</mo>(?!\s*<m[^>]*>[({[])", '<mspace width="0.17em"/>', tex2mathml(formula))


def _inline_formula(translator: Any, node: nodes.math) -> None:
    translator.body.append(_mathml(node.astext()))
    raise nodes.SkipNode


def _block_formula(translator: Any, node: nodes.math_block) -> None:
    block = _mathml(node.astext()).replace("<math ", '<math display="block" ', 1)
    translator.body.append(f'<div class="math">{block}</div>\n')
    raise nodes.SkipNode


def setup(app: Any) -> None:
    app.add_html_math_renderer("mathml", (_inline_formula, None), (_block_formula, None))
