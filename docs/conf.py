"""The documentation as a site: ``make docs``.

Sphinx reads the same Markdown files that read well in a repository browser. Its source folder is
the repository, so that links such as ``../README.md`` and ``../examples/zoo.py`` are what they are
there: README, CONTRIBUTING and CHANGELOG are pages of the site, other files are copied beside it.
Nothing is fetched while it builds, and no page loads anything from elsewhere: `check_offline` warns
if one does, and warnings are errors.
"""

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import grass_fx  # noqa: E402

project = "grass-fx"
author = "the authors of grass-fx"
project_copyright = "the authors of grass-fx, Apache 2.0"
version = release = grass_fx.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["docs/**.md", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
highlight_language = "none"  # an indented block is a command or what one prints
nitpicky = True

myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
# Types of the standard library and of torch have their pages elsewhere, and are not fetched;
# what else docstrings refer to is no part of the API.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|collections|typing|os|pathlib|sympy|Tensor|Any|Optimizer)\b.*"),
    ("py:(func|class)", r"matrix|activation_bytes|grass_fx\.inspect\.activations\.Activations"),
]

html_theme = "furo"
html_title = "grass-fx"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "tango"
pygments_dark_style = "github-dark"

LOADED = re.compile(
    r"""<(?:script|link|img|iframe|object|source)\b[^>]*?(?:src|href|data)="([^"]*)"""
)


def check_offline(app: Sphinx, error: Exception | None) -> None:
    """Warn of everything that a built page would load from another host."""
    if error is not None or app.builder.format != "html":
        return
    found = {
        url
        for page in Path(app.outdir).rglob("*.html")
        for url in LOADED.findall(page.read_text(encoding="utf-8"))
    }
    for style in Path(app.outdir).rglob("*.css"):
        found.update(re.findall(r"(?:url\(|@import\s)[\"']?([^\"')]+)", style.read_text("utf-8")))
    for url in sorted(found):
        if url.startswith(("http:", "https:", "//")):
            logging.getLogger(__name__).warning("a page loads %s", url)


def setup(app: Sphinx) -> None:
    app.connect("build-finished", check_offline)
