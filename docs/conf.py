"""How Sphinx builds this site: python -m sphinx -W -n docs build/site."""

import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import figures  # noqa: E402 - found by the line above

import contrastive_exudate_loss  # noqa: E402 - stays below the import that is found by a line of code

project = "contrastive_exudate_loss"
author = "the contrastive_exudate_loss authors"
copyright = f"{author}, MIT licence"  # noqa: A001 - Sphinx's name
release = version = contrastive_exudate_loss.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"contrastive-exudate-loss {release}"
html_show_sourcelink = False
html_use_index = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_favicon = "static/icon.svg"
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say shapes too
napoleon_custom_sections = ["Shape", "Reference"]


def setup(app: Any) -> None:
    """Draw the figures before a build, and write formulas as MathML, which browsers show without any script."""
    app.connect("builder-inited", lambda _: figures.write_figures(HERE / "figures"))
    app.connect("doctree-read", _add_dark_figures, priority=100)  # before Sphinx collects the images
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))


def _add_dark_figures(app: Any, document: nodes.document) -> None:
    """Beside each NAME-light.svg its NAME-dark.svg; furo shows one of them."""
    for light in list(document.findall(nodes.image)):
        if light["uri"].endswith("-light.svg"):
            dark = light.deepcopy()
            dark["uri"] = light["uri"].replace("-light", "-dark")
            light["classes"].append("only-light")
            dark["classes"].append("only-dark")
            light.parent.insert(light.parent.index(light) + 1, dark)


def _inline(self: Any, node: nodes.Node) -> None:
    self.body.append(_mathml(node, as_block=False))
    raise nodes.SkipNode


def _block(self: Any, node: nodes.Node) -> None:
    self.body.append(f'<div class="formula">{_mathml(node, as_block=True)}</div>')
    raise nodes.SkipNode


def _mathml(node: nodes.Node, *, as_block: bool) -> str:
    return str(latex2mathml.tex2mathml(node.astext(), as_block=as_block))
