"""``srt-ext show``: an image or a video, its tokens and SRT's fields."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import common
from .images import ImageError, find_images, open_image, to_pixels

if TYPE_CHECKING:
    from ..viz import Comparison


def command(
    photo: Annotated[
        Path,
        typer.Argument(
            help="A picture, of any kind that Pillow reads; or a folder: the frames of a video, by "
            "the numbers in their names."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The picture to write (srt.png). Of a video: a .gif or .webp (srt.gif), or, for a "
            "long one, a new folder of frames.",
            show_default=False,
        ),
    ] = None,
    model: common.ModelName = None,
    weights: common.Weights = None,
    views: common.Views = None,
    scale: common.Scale = None,
    quality: common.QualityName = None,
    stride: common.Stride = 1,
    size: common.Size = 448,
    view_batch: common.ViewBatch = 8,
    layer: Annotated[
        list[int] | None,
        typer.Option(
            help="A block or stage, from 0, or from the end; or else the last. Again for more: "
            "a row each.",
            show_default=False,
        ),
    ] = None,
    noise: Annotated[
        bool, typer.Option("--noise", help="Also draw how far the views differ: the noise map.")
    ] = False,
    query: Annotated[
        str | None,
        typer.Option(
            help="x,y in pixels of the picture: also draw the cosine similarity to the features "
            "there (of a video: in the first frame)."
        ),
    ] = None,
    fps: Annotated[float, typer.Option(min=0.1, max=50, help="Frames a second of a video.")] = 10,
) -> None:
    """Draws a photograph, its plain tokens, the same upsampled, and SRT's mean and median.

    All in one PCA basis, a row for each layer. Of a video the basis is that of the first frame. The
    tokens of all views are held in memory.
    """
    video = photo.is_dir()
    output = output or Path("srt.gif" if video else "srt.png")
    if not video:
        common.check_output(output, common.FIGURE_SUFFIXES)
    elif output.suffix:
        common.check_output(output, (".gif", ".webp"))
    with common.user_errors():
        from ..viz import Comparison, draw, write_frames

        common.check_inputs(views, weights)
        paths = find_images(photo) if video else [photo]
        first = open_image(paths[0])
        point = None if query is None else parse_query(query, first.size)
        if video and not output.suffix:
            # Empty: frames of an earlier, longer video would be taken for the end of this one.
            if output.exists() and (not output.is_dir() or any(output.iterdir())):
                raise common.fatal(f"{output} must be a new folder, or an empty one")
            output.mkdir(parents=True, exist_ok=True)
        network = common.load_network(model, weights, layer or [-1])
        settings: Any = {"stride": stride, "view_batch": view_batch, "noise": noise, "query": point}
        with common.warnings_as_notes():
            comparison = Comparison(
                network.backbone, views, scale=scale, quality=quality, **settings
            )
        count = len(comparison.srt.views.offsets)
        names = [f"layer {index}" for index in layer or [-1]]
        if video:
            frames = draw_frames(paths, comparison, network, names, size)
            written = write_frames(frames, output, fps)
            common.echo(f"{written} frames, {len(paths) - written} left out", f"wrote {output}")
            if written < len(paths):
                raise typer.Exit(1)
            return
        pixels = to_pixels(first, size)
        with common.progress_bar("views", count) as progress:
            rows = comparison(network.image(pixels), pixels, progress)
        draw(rows, names).savefig(output, dpi=150)
    height, width = pixels.shape[:2]
    common.echo(
        f"picture {width} x {height}, scale {comparison.srt.scale:g}, {count} views",
        common.timing(network.backbone.seconds, comparison.srt_seconds),
        f"wrote {output}",
    )


def parse_query(text: str, size: tuple[int, int]) -> tuple[float, float]:
    """``x,y`` in an image of (width, height) -> the middle of the pixel, as fractions of both."""
    match = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)
    if match is None:
        raise common.fatal(f"--query must be x,y in whole pixels, such as 120,80; got {text}")
    x, y = int(match[1]), int(match[2])
    if x >= size[0] or y >= size[1]:
        rule = f"x from 0 to {size[0] - 1}, y from 0 to {size[1] - 1}"
        raise common.fatal(f"--query must lie in the picture, {rule}; got {text}")
    return (x + 0.5) / size[0], (y + 0.5) / size[1]


def draw_frames(
    paths: list[Path], comparison: Comparison, network: common.Network, names: list[str], size: int
) -> Iterator[Any]:
    """A frame for each image. Unreadable ones, and those of another size, are skipped."""
    from ..viz import draw, render

    first_size = None
    with common.progress_bar("frames", len(paths)) as progress:
        for i, path in enumerate(paths):
            try:
                image = open_image(path)
                first_size = first_size or image.size
                if image.size != first_size:
                    rule = "frames must be of one size, {} x {}".format(*first_size)
                    raise ImageError("{}; {} is {} x {}".format(rule, path, *image.size))
            except ImageError as reason:
                common.error(f"{reason}; left out")
            else:
                pixels = to_pixels(image, size)
                rows = comparison(network.image(pixels), pixels)
                yield render(draw(rows, names))
            progress(i + 1)
