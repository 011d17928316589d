"""``srt-ext show``: draws an image or a video, its tokens and its SRT fields."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._messages import describe
from ..images import Found, ImageError, find_images, open_image, to_pixels
from . import common

if TYPE_CHECKING:
    from ..extraction import Network
    from ..viz import Comparison


@common.user_errors()
def command(
    photo: Annotated[
        Path,
        typer.Argument(
            metavar="PHOTO",
            help="An image file, or a folder with the frames of a video, in the order of the "
            "numbers in their names.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Figure to write. Default: srt.png. For a video: a .gif or .webp file (default: "
            "srt.gif), or a new folder for the frames of a long video.",
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
            help="Index of a block or stage; negative: from the end. Repeat the option for several "
            "rows. Default: the last layer.",
            show_default=False,
        ),
    ] = None,
    noise: Annotated[
        bool, typer.Option("--noise", help="Also draw the noise map: the spread of the views.")
    ] = False,
    query: Annotated[
        str | None,
        typer.Option(
            help="Also draw the cosine similarity to the features at x,y, in pixels of the image "
            "(for a video: of the first frame)."
        ),
    ] = None,
    fps: Annotated[float, typer.Option(min=0.1, max=50, help="Frames per second of a video.")] = 10,
) -> None:
    """Draws an image, its plain tokens, the upsampled tokens, and SRT's mean and median.

    Each layer has a row, and the panels of a row share a PCA basis. All frames of a video use the
    basis of the first frame. The tokens of all views are kept in memory.

    Example: srt-ext show photo.jpg -o srt.png --views grid:6:2 --noise
    """
    video = photo.is_dir()
    output = output or Path("srt.gif" if video else "srt.png")
    found = find_images(photo) if video else None
    if found is None:
        common.check_output(output, common.FIGURE_SUFFIXES, [photo])
    elif output.suffix:
        common.check_output(output, (".gif", ".webp"), found.files)
    from ..viz import Comparison

    common.check_inputs(views, weights)
    first = open_image(photo) if found is None else first_readable(found.files)
    point = None if query is None else parse_query(query, first.size)
    if video and not output.suffix:
        make_frame_folder(output)
    network = common.load_network(model, weights, layer or [-1])
    settings: Any = {"stride": stride, "view_batch": view_batch, "noise": noise, "query": point}
    with common.warnings_as_notes():
        comparison = Comparison(network.backbone, views, scale=scale, quality=quality, **settings)
    names = [f"layer {index}" for index in layer or [-1]]
    if found is None:
        draw_photo(first, size, comparison, network, names, output)
    else:
        write_video(found, draw_frames(found.files, comparison, network, names, size), output, fps)


def draw_photo(
    image: Any,
    size: int,
    comparison: Comparison,
    network: Network,
    names: list[str],
    output: Path,
) -> None:
    """Writes the figure of an image of Pillow. ``names``: of the rows."""
    from ..viz import draw

    pixels = to_pixels(image, size)
    count = len(comparison.srt.views.offsets)
    with common.progress_bar("views", count) as progress:
        rows = comparison(network.image(pixels), pixels, progress)
    common.save_figure(draw(rows, names), output, dpi=150)
    common.echo(
        common.image_size(pixels, image.size),
        f"scale {comparison.srt.scale:g}, {count} views",
        common.timing(network.backbone.seconds, comparison.srt_seconds),
        f"wrote {output}",
    )


def write_video(found: Found, frames: Iterator[Any], output: Path, fps: float) -> None:
    """Writes the frames and prints a summary. Raises typer.Exit if any frame failed."""
    written = write_frames(frames, output, fps)
    if not written:
        raise common.fatal(f"none of {len(found.files)} frames could be drawn")
    failed = len(found.files) - written
    if skipped := found.skipped_kinds():
        common.echo(f"ignored: {skipped}")
    common.echo(
        f"{len(found.files)} frames: {written} written, {failed} skipped", f"wrote {output}"
    )
    if failed:
        raise typer.Exit(1)


def make_frame_folder(folder: Path) -> None:
    """Creates the folder. It must be empty, so that no frames of an earlier video remain."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise common.fatal(f"{folder} must be a new or empty folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise common.OutputError.of(folder, error) from None


def first_readable(paths: list[Path]) -> Any:
    """The first readable frame of a video, as :func:`open_image`, or an ImageError."""
    for path in paths:
        with suppress(ImageError):
            return open_image(path)
    raise ImageError(f"none of {len(paths)} frames is a readable image, for example {paths[0]}")


def parse_query(text: str, size: tuple[int, int]) -> tuple[float, float]:
    """``x,y`` in an image of (width, height) -> the centre of the pixel, as fractions of both."""
    match = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)
    if match is None:
        raise common.fatal(f"--query must be x,y in whole pixels, such as 120,80; got {text}")
    x, y = int(match[1]), int(match[2])
    if x >= size[0] or y >= size[1]:
        rule = f"x from 0 to {size[0] - 1}, y from 0 to {size[1] - 1}"
        raise common.fatal(f"--query must be in the image, {rule}; got {text}")
    return (x + 0.5) / size[0], (y + 0.5) / size[1]


def draw_frames(
    paths: list[Path], comparison: Comparison, network: Network, names: list[str], size: int
) -> Iterator[Any]:
    """Yields a frame, as an image of Pillow, for each path.

    Images that fail or differ in size from the first are reported and skipped.
    """
    from ..viz import draw, render

    first_size = None
    with common.progress_bar("frames", len(paths)) as progress:
        for i, path in enumerate(paths):
            try:
                image = open_image(path)
                first_size = first_size or image.size
                if image.size != first_size:
                    rule = "frames must have the same size, {} x {}".format(*first_size)
                    raise ImageError("{}; {} is {} x {}".format(rule, path, *image.size))
                pixels = to_pixels(image, size)
                frame = render(draw(comparison(network.image(pixels), pixels), names))
            except Exception as error:  # a failed frame does not end the video
                named = isinstance(error, ImageError)
                reason = str(error) if named else f"{path}: {describe(error)}"
                common.error(f"{reason}; skipped")
            else:
                yield frame
            progress(i + 1)


def write_frames(frames: Iterator[Any], output: Path, fps: float) -> int:
    """Writes images of Pillow, all of one size, and returns their number.

    A .gif or .webp is an animation of ``fps`` frames per second; all frames are kept in memory. In
    a folder, the frames are written as 00000.png and so on as soon as they are drawn.
    """
    if not output.suffix:
        count = 0
        for count, frame in enumerate(frames, 1):
            with common.replacing(output / f"{count - 1:05}.png") as partial:
                frame.save(partial, "PNG")
        return count
    kept = list(frames)
    settings = {"append_images": kept[1:], "duration": round(1000 / fps), "loop": 0}
    for first in kept[:1]:
        with common.replacing(output.resolve()) as partial:
            first.save(partial, output.suffix[1:].upper(), save_all=True, **settings)
    return len(kept)
