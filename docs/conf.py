"""The documentation site: ``sphinx-build -W --keep-going -n docs build/docs`` (CONTRIBUTING.md)."""

import re
from pathlib import Path

import srt_ext

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://github.com/srt-ext/srt_ext"

project = "srt_ext"
author = "srt_ext maintainers"
copyright = "2026, srt_ext maintainers"
version = release = srt_ext.__version__

extensions = [
    "myst_nb",  # pages in Markdown, and the notebook
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["**/.ipynb_checkpoints"]
html_theme = "furo"
html_title = "srt_ext"
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
}

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebook is committed with its outputs; CI executes it

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_rtype = False
python_use_unqualified_type_names = True
copybutton_exclude = ".linenos, .gp, .go"

# Cross references within srt_ext are checked. Those to other projects are not: their inventories
# would have to be downloaded, and the site builds without a network.
nitpick_ignore_regex = [
    ("py:.*", r"(collections|nn|np|numpy|os|pathlib|pyarrow|torch|typing)\..*"),
]


def link_to_repository(app, docname, source):
    """Points links that leave ``docs/``, which work on GitHub, at the repository."""

    def link(match):
        path = match[1].split("#")[0]
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"docs/{docname}.md links to ../{path}, which does not exist")
        return f"]({REPOSITORY}/blob/main/{match[1]})"

    if not docname.startswith("api/"):
        source[0] = re.sub(r"(?<!\.svg)(?<!\.png)\]\(\.\./([^)]+)\)", link, source[0])


def setup(app):
    app.connect("source-read", link_to_repository)
