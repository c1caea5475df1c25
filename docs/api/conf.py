"""The API reference: made from docstrings by Sphinx (`make docs`), and every warning is an
error.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring

project = "Holdfast"
release = metadata.version("holdfast")
author = "The Holdfast authors"

extensions = ["sphinx.ext.autodoc"]
default_role = "code"
html_theme = "alabaster"
html_theme_options = {
    "page_width": "70em",
    "description": "API reference",
    "show_powered_by": False,
}
html_show_copyright = False

autoclass_content = "both"
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_preserve_defaults = True
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

nitpicky = True
# Types of Python and torch are named without a link: their pages are not looked up on the network.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|numpy|pathlib|collections|contextlib|typing|os|enum)(\..*)?")
]

SECTIONS = Config(napoleon_use_rtype=False)


def read_sections(
    app: Sphinx, what: str, name: str, of: object, options: Any, lines: list[str]
) -> None:
    """Read Args, Returns and Raises; in the one line of a field or property a colon is a colon."""
    if what not in ("attribute", "property", "data"):
        lines[:] = GoogleDocstring(lines, SECTIONS, what=what, name=name, obj=of).lines()


def setup(app: Sphinx) -> None:
    """Sphinx calls it."""
    app.connect("autodoc-process-docstring", read_sections)
