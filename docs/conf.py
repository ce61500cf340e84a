"""Settings of Sphinx; `make docs` runs it on a copy of this directory, see tools/build_docs.py."""

from __future__ import annotations

import importlib.metadata

from sphinx.ext.napoleon.docstring import GoogleDocstring

project = "prodisco-sandbox"
copyright = "the authors of prodisco-sandbox"  # noqa: A001 - Sphinx reads this name
release = importlib.metadata.version(project)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
root_doc = "index"
exclude_patterns = ["README.md"]
html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False
html_show_sourcelink = False

# Slugs of headings are GitHub's, so that links work there and here.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "deflist"]

# Docstrings name things in single backticks; what is no object of the reference is shown as code.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Napoleon takes the text of a property up to its first colon for a type.
GoogleDocstring._parse_attribute_docstring = lambda self: self._consume_to_end()
