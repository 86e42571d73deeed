"""How Sphinx builds these pages: `python3 -m nox -s docs`."""

from gpt2_multi import __version__ as release  # noqa: F401

project = "gpt2_multi"
copyright = "the authors of gpt2_multi"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 2  # a link to a heading of another page
exclude_patterns = ["_build"]
html_theme = "furo"
default_role = "code"  # docstrings put code between single backticks
autodoc_default_options = {"members": True, "inherited-members": "Module", "member-order": "bysource"}
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
