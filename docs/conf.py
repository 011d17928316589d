"""The documentation site: ``sphinx-build -W --keep-going -n docs build/docs`` (CONTRIBUTING.md)."""

import re
from pathlib import Path

import typer.cli

import srt_ext
from srt_ext import options
from srt_ext.cli import app

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

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
smartquotes = False  # they turn --option into a dash
nb_execution_mode = "off"  # the notebook is committed with its outputs; CI executes it

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# The names under which signatures show the types of options; api/options.md describes them.
autodoc_type_aliases = {
    **{name: f"srt_ext.options.{name}" for name in vars(options) if name[0].isupper()},
    **{name: f"srt_ext.backbones.{name}" for name in ("Layer", "Model")},
}
napoleon_use_rtype = False
python_use_unqualified_type_names = True
copybutton_exclude = ".linenos, .gp, .go"

# Cross references within srt_ext are checked. Those to other projects are not: their inventories
# would have to be downloaded, and the site builds without a network.
nitpick_ignore_regex = [
    ("py:.*", r"(collections|jax|nn|np|numpy|os|pathlib|pyarrow|torch|typing)\..*"),
    # The sizes and dtypes in "[B, N], int64:" of a property; type variables and bases of streams.
    ("py:class", r"[A-Z]|int64|Path|srt_ext\.streaming\.(A|N|\w*Stream)"),
]

# The navigation: captions and pages. It is added to index.md, because GitHub would show directives.
NAVIGATION = {
    "Getting started": ("installation", "quickstart", "notebook"),
    "Guide": (
        "settings",
        "models",
        "views",
        "equivariance",
        "spot",
        "streaming",
        "extraction",
        "frameworks",
        "jax",
        "onnx",
        "cpp",
        "faq",
    ),
    "Background": ("ops", "kernels", "quality", "benchmarks", "compatibility"),
    "API reference": (
        "api/srt",
        "api/ops",
        "api/views",
        "api/streams",
        "api/models",
        "api/spot",
        "api/data",
        "api/arrays",
        "api/onnx",
        "api/options",
        "api/cli",
        "api/reference",
    ),
    "Project": ("changelog", f"Contributing <{REPOSITORY}/blob/main/CONTRIBUTING.md>"),
}


def toctree(caption, pages):
    return "\n".join(["\n```{toctree}", ":hidden:", f":caption: {caption}\n", *pages, "```\n"])


def prepare(_, docname, source):
    """Adds generated parts; checks links that leave ``docs/``, points them at the repository."""

    def link(match):
        path, _, anchor = match[1].partition("#")
        if not (ROOT / path).exists() or (anchor and anchor not in anchors(ROOT / path)):
            raise FileNotFoundError(
                f"docs/{docname}.md links to ../{match[1]}, which does not exist"
            )
        if path.startswith("docs/"):  # in the notebook
            return f"]({match[1].removeprefix('docs/')})"
        return f"]({REPOSITORY}/blob/main/{match[1]})"

    if docname == "api/cli":
        command = typer.main.get_command(app)
        source[0] += typer.cli.get_docs_for_click(
            obj=command, ctx=typer.Context(command), name="srt-ext", title="Commands"
        )
    elif not docname.startswith("api/"):
        source[0] = re.sub(r"\]\(\.\./([^)]+(?<!\.svg)(?<!\.png))\)", link, source[0])
    if docname == "index":
        source[0] += "".join(toctree(*part) for part in NAVIGATION.items())


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def setup(app):
    app.connect("source-read", prepare)
