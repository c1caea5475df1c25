"""The API reference: made from docstrings by Sphinx, `make docs`."""

from __future__ import annotations

from importlib import metadata

project = "Holdfast"
release = metadata.version("holdfast")
copyright = "the Holdfast authors"

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
default_role = "code"
html_theme = "alabaster"
html_theme_options = {"page_width": "70em", "description": "API reference"}

autodoc_default_options = {"members": True, "member-order": "bysource", "exclude-members": "__new__"}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
add_module_names = False
python_use_unqualified_type_names = True

# Names of other projects, and of ours that no page describes, are shown without a link.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|numpy|np|pathlib|collections|typing|os|enum)(\..*)?"),
]
