"""How Sphinx builds the documentation: ``python -m sphinx -W docs docs/_build``."""

from __future__ import annotations

import pathlib
import shutil
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from axattn.version import __version__  # noqa: E402

project = "axattn"
author = "The axattn authors"
copyright = "2026, The axattn authors"
release = version = __version__

extensions = [
    "myst_nb",  # pages and notebooks
    "sphinx.ext.autodoc",  # the API, from docstrings
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "Thumbs.db", ".DS_Store"]

html_theme = "furo"
html_title = f"axattn {version}"
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["axattn.css"]
copybutton_exclude = ".linenos, .gp, .go"  # neither prompts nor outputs

# Notebooks come with their outputs; the tests execute them.
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# `name` in a docstring is a link where there is such an object.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # attributes of dataclasses are described once


def _bring_notebooks(_) -> None:
    """Sphinx reads only what is below its own folder."""
    folder = HERE / "notebooks"
    folder.mkdir(exist_ok=True)
    for path in sorted((HERE.parent / "examples" / "notebooks").glob("*.ipynb")):
        shutil.copyfile(path, folder / path.name)


def setup(app) -> None:
    app.connect("builder-inited", _bring_notebooks)
