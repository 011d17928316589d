"""``srt-ext demo``: what SRT does for the small ViT that is included."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from . import common
from .images import open_image, to_pixels


def command(
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture to write.")] = Path(
        "srt-demo.png"
    ),
    views: common.Views = "best:16:3",  # for patches of 8 pixels what a radius of 6 is for 16
    scenes: Annotated[
        int, typer.Option(min=1, max=1000, help="Number of scenes that are scored.")
    ] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Another one gives other scenes.")] = 0,
) -> None:
    """Draws and scores what SRT does for a small ViT that is included; nothing is downloaded.

    It was trained on generated scenes, whose segments and depth are exactly known. The scores are
    of scenes that it has not seen. The picture has the first scene with solids of all kinds, and a
    photograph.
    """
    common.check_output(output, common.FIGURE_SUFFIXES)
    with common.user_errors():
        from ..demo.quality import HELD_OUT, PHOTO, SIDE, Evaluation, first_complete_seed
        from ..demo.scenes import scene
        from ..hub import SMALL
        from ..viz import draw

        common.check_inputs(views, None)
        network = common.Network(SMALL, None, [-1])
        evaluation, first = Evaluation(network, views), HELD_OUT + 1000 * seed
        with common.progress_bar("scenes", scenes) as progress:
            generated = (scene(first + i, SIDE, SIDE) for i in range(scenes))
            scores = evaluation.scores(generated, progress)
        table = Table("", "segments", "at outlines", "kinds of solids", "nearness")
        for method, score in scores.items():
            table.add_row(method, *(f"{value:.3f}" for value in score))
        common.console.print(table)
        common.echo(
            f"views {views}, scenes of {SIDE} x {SIDE} pixels: {scenes}",
            "mean IoU of background, floor and solids; the same within 4 pixels of where they "
            "meet; of the kinds",
            "nearness: RMSE in 1/m; lower is better",
        )
        photo = to_pixels(open_image(PHOTO), 2 * SIDE)
        example = scene(first_complete_seed(first), SIDE, SIDE)
        names, rows = zip(*evaluation.rows(example, photo), strict=True)
        draw(rows, names).savefig(output, dpi=100)
    common.echo(f"wrote {output}")
