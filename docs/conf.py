"""Sphinx configuration. `make docs` builds with warnings as errors."""

from importlib.metadata import version as installed_version

project = "imgopt_fast"
copyright = "2026, the imgopt_fast authors"
version = release = installed_version("imgopt-fast")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = "imgopt_fast"
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
exclude_patterns = ["_build"]
