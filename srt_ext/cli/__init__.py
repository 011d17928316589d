"""The command: ``srt-ext demo``, ``show``, ``features``, ``spot`` and ``info``."""

import typer

from . import demo, features, info, show, spot

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Dense, sub-token features from frozen Vision Transformers (SRT).",
)
app.command("show")(show.command)
app.command("features")(features.command)
app.command("spot")(spot.command)
app.command("demo")(demo.command)
app.command("info")(info.command)
