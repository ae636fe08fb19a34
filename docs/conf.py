"""How Sphinx builds the documentation: ``python -m sphinx -W docs docs/_build/html``."""

from __future__ import annotations

import inspect
import pathlib
import re
import shutil
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from axattn._version import __version__  # noqa: E402

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
exclude_patterns = ["_build", "jupyter_execute", "Thumbs.db", ".DS_Store"]

html_theme = "furo"
html_title = f"axattn {version}"
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["axattn.css"]
copybutton_exclude = ".linenos, .gp, .go"  # neither prompts nor outputs

# Notebooks come with their outputs; the tests execute them.
nb_execution_mode = "off"
nb_render_markdown_format = "gfm"  # outputs have tables, which CommonMark has not
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# `name` in a docstring is a link where there is such an object.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
# The docstrings say more of an array than its type does: shape, dtype, unit.
autodoc_typehints = "none"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_attr_annotations = False  # see autodoc_typehints
napoleon_use_ivar = True  # attributes of dataclasses are described once


def _bring_notebooks(_) -> None:
    """Sphinx reads only what is below its own folder."""
    folder = HERE / "notebooks"
    folder.mkdir(exist_ok=True)
    for path in sorted((HERE.parent / "examples" / "notebooks").glob("*.ipynb")):
        shutil.copyfile(path, folder / path.name)


# What Python prints of defaults that have no other text.
_SHORT = {
    r"<function (?:\w+\.<locals>\.)?(\w+)(?: at 0x[0-9a-f]+)?>": r"\1",
    r"<class '(?:\w+\.)*(\w+)'>": r"\1",
    r"mappingproxy\(\{\}\)": "{}",
    # What Linen adds to every module's constructor.
    r", parent=<flax[^>]*>, name=None": "",
}


def _signature(_, what, name, found, options, signature, returned):
    """Signatures that can be read, those of NNX layers too, which a metaclass hides."""
    if what == "class" and name.startswith("axattn.nnx."):
        parameters = list(inspect.signature(found.__init__).parameters.values())[1:]
        plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
        signature = str(inspect.Signature(plain))
    for pattern, short in _SHORT.items():
        signature = signature and re.sub(pattern, short, signature)
    return signature, returned


def setup(app) -> None:
    app.connect("builder-inited", _bring_notebooks)
    app.connect("autodoc-process-signature", _signature)
