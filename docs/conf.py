"""The site that `make docs` builds: Markdown pages and the docstrings of pyreg, by Sphinx.

Everything that a page needs lies in the folder that is built, search and formulas too: formulas become MathML, which
browsers render without a script.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert

import pyreg

project = "pyreg"
author = "the pyreg authors"
copyright = author
version = release = pyreg.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["README.md"]

html_theme = "furo"
html_title = "pyreg"
html_math_renderer = "mathml"
html_copy_source = False
html_show_copyright = False

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a file that is included may begin with any level of heading

# Names of pyreg are links, and one that leads nowhere fails the build. Those of other projects are plain.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!pyreg\b).*")]

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autosummary_generate = False
napoleon_custom_sections = ["Shape", "Gradient"]
napoleon_use_rtype = False


def _inline_formula(translator: Any, node: nodes.math) -> None:
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def _block_formula(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>\n')
    raise nodes.SkipNode


def setup(app: Any) -> None:
    app.add_html_math_renderer("mathml", (_inline_formula, None), (_block_formula, None))
