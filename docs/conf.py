"""The documentation site: ``sphinx-build -W --keep-going -n docs build/docs`` (CONTRIBUTING.md)."""

import enum
import re
import types
import typing
from pathlib import Path

import srt_ext
from srt_ext import options

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
    ("py:.*", r"(collections|nn|np|numpy|os|pathlib|pyarrow|torch|typing)\..*"),
    ("py:class", r"[A-Z]|int64|Path"),  # also the sizes and dtypes in "[B, N], int64:" of a property
]


def link_to_repository(app, docname, source):
    """Points links that leave ``docs/``, which work on GitHub, at the repository."""

    def link(match):
        path = match[1].split("#")[0]
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"docs/{docname}.md links to ../{path}, which does not exist")
        return f"]({REPOSITORY}/blob/main/{match[1]})"

    if docname == "api/cli":
        source[0] += commands()
    elif not docname.startswith("api/"):
        source[0] = re.sub(r"\]\(\.\./([^)]+(?<!\.svg)(?<!\.png))\)", link, source[0])


def commands():
    """The help of every command of srt-ext, in Markdown."""
    import typer

    from srt_ext.cli import app

    def value(hint):
        """What an option takes, as in the usage line of a command."""
        if typing.get_origin(hint) in (typing.Union, types.UnionType, list):
            return value(next(t for t in typing.get_args(hint) if t is not type(None)))
        if typing.get_origin(hint) is typing.Literal:
            return "|".join(typing.get_args(hint))
        if isinstance(hint, type) and issubclass(hint, enum.Enum):
            return "|".join(one.value for one in hint)
        return {bool: "", int: "N", float: "X", Path: "PATH"}.get(hint, "TEXT")

    parts = []
    for name, command in typer.main.get_command(app).commands.items():
        hints = typing.get_type_hints(command.callback)
        parts.append(f"\n## srt-ext {name}\n\n{command.help}\n")
        rows = []
        for param in command.params:
            if param.param_type_name == "argument":
                term = f"`{param.name.upper()}`"
            else:
                kinds = (", ".join(names) for names in (param.opts, param.secondary_opts) if names)
                term = f"`{' / '.join(kinds)} {value(hints[param.name])}".strip() + "`"
            default = getattr(param.default, "value", param.default)
            ends = [" Required." if param.required else ""]
            if default not in (None, False, True, (), [], "") and param.show_default:
                ends.append(f" Default: {default}.")
            rows.append(f"{term}\n: {param.help}{''.join(ends)}\n")
        parts += rows
    return "\n".join(parts)


def setup(app):
    app.connect("source-read", link_to_repository)
