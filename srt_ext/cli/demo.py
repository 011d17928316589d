"""``srt-ext demo``: SRT compared with plain tokens, for the included small ViT."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..images import open_image, to_pixels
from . import common


@common.user_errors()
def command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Figure to write.")] = Path(
        "srt-demo.png"
    ),
    views: common.Views = "4",
    scenes: Annotated[int, typer.Option(min=1, max=1000, help="Number of scenes to score.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the scenes.")] = 0,
) -> None:
    """Compares SRT with plain tokens for an included small ViT; nothing is downloaded.

    Labels are propagated from one frame of a generated scene to a second frame: each cell receives
    the labels of the cell with the most similar features. The exact labels of both frames are
    known, and the scenes were not used for training. The figure shows the first scene with three
    clearly visible rods, and a photograph.
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
        "all solids, thin solids (not wider than a patch): mean IoU; outlines: F within 1 pixel",
        f"SRT: --views {views}; scale {SCALE}: frames enlarged by {SCALE}, without or with SRT",
    )
    photo = to_pixels(open_image(PHOTO), 2 * SIDE)
    names, rows = zip(*evaluation.rows(first_with_rods(first), photo), strict=True)
    common.save_figure(draw(rows, names), output, dpi=100)
    common.echo(f"wrote {output}")
