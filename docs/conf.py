"""Sphinx: the pages of this folder and the API reference from the docstrings (`make docs`)."""

import re

import w2vbert_fast

project = "w2vbert_fast"
version = release = w2vbert_fast.__version__
project_copyright = "the w2vbert_fast authors, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"w2vbert_fast {release}"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_hints = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
nitpicky = False

_LINK_OUT = re.compile(r"\[`?([^]`]+)`?\]\(\.\./\.\./[^)]*\)")
_CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")


def _markdown_code(app, what, name, obj, options, lines):
    """Docstrings mark code with single backticks, as Markdown does; reStructuredText has two."""
    text = "\n".join(lines)
    lines[:] = _CODE.sub(r"``\1``", text).split("\n")


def _without_links_out(app, docname, source):
    """Pages are read on the repository's site too, where they link to files outside this folder."""
    source[0] = _LINK_OUT.sub(r"`\1`", source[0])


def setup(app):
    app.connect("source-read", _without_links_out)
    # In front of napoleon, which would take what is between backticks for a type.
    app.connect("autodoc-process-docstring", _markdown_code, priority=400)
