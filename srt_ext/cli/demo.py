"""``srt-ext demo``: what SRT does for the small ViT that is included."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..images import open_image, to_pixels
from . import common


@common.user_errors()
def command(
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture to write.")] = Path(
        "srt-demo.png"
    ),
    views: common.Views = "4",
    scenes: Annotated[
        int, typer.Option(min=1, max=1000, help="Number of scenes that are scored.")
    ] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Another one gives other scenes.")] = 0,
) -> None:
    """Draws and scores what SRT does for a small ViT that is included; nothing is downloaded.

    Labels are propagated from one frame of a generated scene to a second: each cell takes those of
    the cell with the most similar features. The exact labels of both frames are known. The scenes
    were not trained on. The picture shows the first scene with three rods that are clearly visible,
    and a photograph.
    """
    common.check_output(output, common.FIGURE_SUFFIXES)
    from ..demo.quality import (
        HELD_OUT,
        PHOTO,
        SCALE,
        SIDE,
        Evaluation,
        first_with_rods,
        frames,
    )
    from ..extraction import Network
    from ..hub import SMALL
    from ..viz import draw

    common.check_inputs(views, None)
    evaluation = Evaluation(Network.load(SMALL), views)
    first = HELD_OUT + 1000 * seed
    with common.progress_bar("scenes", scenes) as progress:
        scores = evaluation.scores((frames(first + i) for i in range(scenes)), progress)
    table = Table("", "all solids", "thin solids", "outlines", "ms/frame")
    for method, (*values, milliseconds) in scores.items():
        cells = [f"{value:.3f}" for value in values]
        table.add_row(method, *cells, f"{milliseconds:.0f}")
    common.console.print(table)
    common.echo(
        f"{scenes} scenes of {SIDE} x {SIDE} pixels, labels propagated to a second frame",
        "solids: mean IoU of all, of those not wider than a patch; outlines: F within a pixel",
        f"SRT: views {views}; scale {SCALE}: of frames enlarged by {SCALE}",
    )
    photo = to_pixels(open_image(PHOTO), 2 * SIDE)
    names, rows = zip(*evaluation.rows(first_with_rods(first), photo), strict=True)
    common.save_figure(draw(rows, names), output, dpi=100)
    common.echo(f"wrote {output}")
