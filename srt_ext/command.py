"""The command: ``srt-ext demo``, ``show``, ``features`` and ``info``."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from . import __version__
from ._library import cuda_unavailable, unavailable
from .pictures import Network, PictureError, find_pictures, open_picture, pixels_of

# Of timm. Where its weights are not within reach, the small model of backbones.py stands in.
DEFAULT_MODEL = "vit_small_patch14_dinov2.lvd142m"

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Dense features from frozen Vision Transformers (SRT), by fast kernels.",
)
console = Console()

ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A model of timm; or small, which comes with srt_ext and needs no network. Without it "
        "a DINOv2 ViT-S/14, or small where the weights of that cannot be had.",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="A .safetensors state dict of the model; without it the pretrained weights are taken."
    ),
]
Views = Annotated[
    str,
    typer.Option(
        help="grid:RADIUS[:STEP], paper:RADIUS, lattice:N:RADIUS, sobol:N:RADIUS[:SEED], "
        "ring:N:RADIUS or best:N[:RADIUS]; radius and step in pixels, N views."
    ),
]
Stride = Annotated[int, typer.Option(min=1, help="Pixels per output cell; 1 is pixel scale.")]
Size = Annotated[
    int, typer.Option(min=0, help="Longer side to which a larger picture is reduced; 0 keeps it.")
]
ViewBatch = Annotated[int, typer.Option(min=1, help="Views in one forward of the model.")]


class DType(str, Enum):
    """Of features in a file."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def complain(message: str, word: tuple[str, str] = ("error", "red")) -> None:
    """Says what is wrong on stderr, behind a word in a colour."""
    text = Text.assemble((f"{word[0]}: ", word[1]), message)  # no markup: a name may hold brackets
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)


def fail(message: str) -> typer.Exit:
    """Says what is wrong; to be raised."""
    complain(message)
    return typer.Exit(1)


def say(*lines: str) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def one_line() -> Iterator[None]:
    """What a user can set right is an error of one line, not a traceback."""
    if unavailable is not None:
        raise fail(unavailable)
    try:
        from .backbones import ModelError
        from .folder import FolderError

        yield
    except (ValueError, OSError, ModelError, FolderError) as error:
        raise fail(str(error)) from None
    except ImportError as error:
        raise fail(f"{error}; pip install 'srt_ext[models]' has all that is needed") from None


@contextmanager
def bar(what: str, total: int) -> Iterator[Any]:
    """A progress bar, as a function of how many are done."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    ) as shown:
        task = shown.add_task(what, total=total)
        yield lambda done: shown.update(task, completed=done)


def count_views(views: str, weights: Path | None) -> int:
    """What can be wrong and is quick to see, before a model is loaded."""
    from .views import resolve

    if weights is not None and not weights.is_file():
        raise fail(f"{weights} is no file")
    return len(resolve(views)[0])


def network_of(model: str | None, weights: Path | None, layers: int | list[int] | None) -> Network:
    """Of the default model if none is named; where its weights cannot be had, and this is said, of
    the small one. A model that was named is never another one.
    """
    from .backbones import SMALL, PretrainedError

    try:
        return Network(DEFAULT_MODEL if model is None else model, weights, layers)
    except PretrainedError as error:
        if model is not None:
            raise
        complain(
            f"the weights of {DEFAULT_MODEL} cannot be had ({error.reason}): using the small ViT "
            "that comes with srt_ext; --model or --weights choose another",
            ("note", "yellow"),
        )
    return Network(SMALL, None, layers)


def times(model: float, total: float) -> str:
    """In seconds; the total is the model's and SRT's."""
    share = 100 * (total - model) / max(total, 1e-9)
    return f"model {model:.2f} s, SRT {total - model:.3f} s ({share:.1f} %)"


def check_output(path: Path, suffixes: tuple[str, ...]) -> None:
    """Before hours of work are lost on it."""
    if path.suffix.lower() not in suffixes:
        raise fail(f"--output must end in {' or '.join(suffixes)}; got {path}")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise fail(f"the folder {folder} does not exist")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise fail(f"{path} cannot be written")


def check_folder(path: Path) -> None:
    """An output of frames: the frames of an earlier, longer video would be taken for its end."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise fail(f"{path} must be a new folder, or an empty one")
    path.mkdir(parents=True, exist_ok=True)


def read_query(text: str, size: tuple[int, int]) -> tuple[float, float]:
    """``x,y`` in a picture of (width, height) -> the middle of the pixel, as shares of both."""
    found = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)
    if found is None:
        raise fail(f"--query must be x,y in whole pixels, such as 120,80; got {text}")
    x, y = int(found[1]), int(found[2])
    if x >= size[0] or y >= size[1]:
        rule = f"x from 0 to {size[0] - 1}, y from 0 to {size[1] - 1}"
        raise fail(f"--query must lie in the picture, {rule}; got {text}")
    return (x + 0.5) / size[0], (y + 0.5) / size[1]


@app.command()
def show(
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
    model: ModelName = None,
    weights: Weights = None,
    views: Views = "best:16",
    stride: Stride = 1,
    size: Size = 448,
    view_batch: ViewBatch = 8,
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
    if output is None:
        output = Path("srt.gif" if video else "srt.png")
    if not video:
        check_output(output, (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp"))
    elif output.suffix:
        check_output(output, (".gif", ".webp"))
    with one_line():
        from .visualize import Comparison, draw

        count = count_views(views, weights)
        pictures = find_pictures(photo) if video else [photo]
        first = open_picture(pictures[0])
        point = None if query is None else read_query(query, first.size)
        if video and not output.suffix:
            check_folder(output)
        network = network_of(model, weights, layer or [-1])
        comparison = Comparison(
            network.backbone,
            views,
            stride=stride,
            view_batch=view_batch,
            noise=noise,
            query=point,
        )
        names = [f"layer {index}" for index in layer or [-1]]
        if video:
            draw_video(pictures, comparison, network, names, output, size, fps)
            return
        pixels = pixels_of(first, size)
        with bar("views", count) as progress:
            rows = comparison(network.image(pixels), pixels, progress)
        draw(rows, names).savefig(output, dpi=150)
    height, width = pixels.shape[:2]
    say(
        f"picture {width} x {height}, {count} views",
        times(network.backbone.seconds, comparison.srt_seconds),
        f"wrote {output}",
    )


def draw_video(
    paths: list[Path],
    comparison: Any,  # visualize.Comparison
    network: Network,
    names: list[str],
    output: Path,
    size: int,
    fps: float,
) -> None:
    """A frame for each picture. One that cannot be read, or has another size, is left out."""
    from .visualize import draw, rendered, write_frames

    failed = 0

    def frames() -> Iterator[Any]:
        nonlocal failed
        of_first = None
        with bar("frames", len(paths)) as progress:
            for i, path in enumerate(paths):
                try:
                    picture = open_picture(path)
                    of_first = of_first or picture.size
                    if picture.size != of_first:
                        rule = "frames must be of one size, {} x {}".format(*of_first)
                        raise PictureError("{}; {} is {} x {}".format(rule, path, *picture.size))
                except PictureError as error:
                    complain(f"{error}; left out")
                    failed += 1
                else:
                    pixels = pixels_of(picture, size)
                    rows = comparison(network.image(pixels), pixels, lambda _done: None)
                    yield rendered(draw(rows, names))
                progress(i + 1)

    written = write_frames(frames(), output, fps)
    say(f"{written} frames, {failed} left out", f"wrote {output}")
    if failed:
        raise typer.Exit(1)


@app.command()
def features(
    photo: Annotated[
        Path,
        typer.Argument(
            help="A picture, of any kind that Pillow reads; or a folder of pictures and of such "
            "folders."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="A .npz or .safetensors file. Of a folder: a folder of .safetensors files.",
        ),
    ],
    model: ModelName = None,
    weights: Weights = None,
    views: Views = "best:16",
    stride: Stride = 1,
    size: Size = 448,
    view_batch: ViewBatch = 8,
    layer: Annotated[
        int | None,
        typer.Option(help="The block or stage, from 0, or from the end; or else the last."),
    ] = None,
    dtype: Annotated[DType, typer.Option(help="Of what is written.")] = DType.float32,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that decode the pictures of a folder; 0: none.")
    ] = 2,
) -> None:
    """Writes the SRT field of photographs: `field` [C, H', W'] and `prefix` [K, C].

    Of FOLDER/a/b.jpg: OUTPUT/a/b.jpg.safetensors. The same command again goes on where it was
    stopped: what is finished is skipped. Files with other settings are an error, not a mixture.
    """
    many = photo.is_dir()
    if not many:
        check_output(output, (".npz", ".safetensors"))
        if output.suffix.lower() == ".npz" and dtype is DType.bfloat16:
            raise fail(f"--dtype bfloat16 does not exist in .npz files; got {output}")
    elif output.suffix.lower() in (".npz", ".safetensors") or output.is_file():
        raise fail(f"--output must be a folder for the pictures of a folder; got {output}")
    with one_line():
        import torch

        from .wrapper import SRT

        count = count_views(views, weights)
        if many:
            inside = None if output.resolve() == photo.resolve() else output
            pictures = find_pictures(photo, nested=True, without=inside)
        else:
            pixels = pixels_of(open_picture(photo), size)
        network = network_of(model, weights, layer)
        srt = SRT(network.backbone, views, stride=stride, view_batch=view_batch)
        kind: torch.dtype = getattr(torch, dtype.value)
        settings = {
            "srt_ext": __version__,
            "model": network.name,
            "weights": network.digest(),
            "views": views,
            "stride": str(stride),
            "size": str(size),
            "layer": "last" if layer is None else str(layer),
            "dtype": dtype.value,
        }
        if many:
            from .folder import Folder, alone

            with alone(output):
                folder = Folder(photo, pictures, output, settings)
                write_folder(folder, network, srt, size=size, dtype=kind, workers=workers)
            return
        write_one(pixels, photo, output, network, srt, kind, settings, count)


def write_one(
    pixels: np.ndarray,  # [H, W, 3] uint8
    photo: Path,
    output: Path,
    network: Network,
    srt: Any,
    dtype: Any,
    settings: dict[str, str],
    views: int,
) -> None:
    from .folder import tensors_of

    with bar("views", views) as progress:
        start = time.perf_counter()
        made = srt(network.image(pixels), progress)
        seconds = time.perf_counter() - start
    tensors = tensors_of(made, dtype)
    if output.suffix.lower() == ".npz":
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
        with output.open("wb") as file:  # savez would add its own suffix to .NPZ
            np.savez(file, **arrays)
    else:
        from .folder import save

        save(tensors, output, {**settings, "photo": photo.name})
    height, width = pixels.shape[:2]
    shape = " x ".join(str(n) for n in tensors["field"].shape)
    say(
        f"picture {width} x {height}, {views} views, field {shape}",
        times(network.backbone.seconds, seconds),
        f"wrote {output}",
    )


def write_folder(folder: Any, network: Network, srt: Any, **settings: Any) -> None:
    """With a bar, and a summary however it ends."""
    done = folder.summary
    try:
        with bar("pictures", done.found) as progress:

            def step() -> None:
                progress(done.there + done.written + done.failed)

            step()
            folder.run(network, srt, complain=complain, progress=step, **settings)
    except KeyboardInterrupt:
        complain("interrupted; the same command goes on")
        raise typer.Exit(130) from None
    finally:
        changed = f" ({done.changed} had changed since)" if done.changed else ""
        say(
            f"{done.found} pictures: {done.written} written{changed}, {done.there} were there, "
            f"{done.failed} failed",
            f"{done.bytes / 1e9:.2f} GB in {done.seconds:.1f} s, "
            f"{network.backbone.seconds:.1f} s of them in the model",
            f"wrote to {folder.out}",
        )
    if done.failed:
        raise typer.Exit(1)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture to write.")] = Path(
        "srt-demo.png"
    ),
    views: Views = "best:16:3",  # of patches of 8 pixels that is what 6 is of 16
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
    check_output(output, (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp"))
    with one_line():
        from .backbones import SMALL
        from .demo.quality import HELD_OUT, PHOTO, SIDE, Judge, telling
        from .demo.scenes import scene
        from .visualize import draw

        count = count_views(views, None)
        judge, first = Judge(Network(SMALL, None, [-1]), views), HELD_OUT + 1000 * seed
        with bar("scenes", scenes) as progress:
            scores = judge.scores((scene(first + i, SIDE, SIDE) for i in range(scenes)), progress)
        table = Table("", "segments", "at outlines", "kinds of solids", "nearness")
        for way, score in scores.items():
            table.add_row(way, *(f"{value:.3f}" for value in score))
        console.print(table)
        say(
            f"{count} views, scenes of {SIDE} x {SIDE} pixels: {scenes}",
            "mean IoU of background, floor and solids; the same within 4 pixels of where they "
            "meet; of the kinds",
            "nearness: RMSE in 1/m; lower is better",
        )
        photo = pixels_of(open_picture(PHOTO), 2 * SIDE)
        names, rows = zip(*judge.rows(scene(telling(first), SIDE, SIDE), photo), strict=True)
        draw(rows, names).savefig(output, dpi=100)
    say(f"wrote {output}")


def _version(package: str) -> str:
    try:
        return str(import_module(package).__version__)
    except Exception as error:  # a broken package breaks in its own way
        return f"not available: {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _default_model() -> str:
    try:
        from .backbones import cached_weights

        cached = cached_weights(DEFAULT_MODEL) is not None
    except Exception as error:  # as above
        return f"{DEFAULT_MODEL}: not available: {type(error).__name__}: {error}"
    return f"{DEFAULT_MODEL}: {'in' if cached else 'not in'} the hub's cache"


def _cuda() -> str:
    if cuda_unavailable is not None:
        return f"not available: {cuda_unavailable}"
    import torch

    if not torch.cuda.is_available():
        return "kernels loaded, but torch finds no GPU"
    gpus = (torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f"{', '.join(gpus)} (CUDA {torch.version.cuda})"


def _numpy() -> str:
    try:
        from .numpy import get_num_threads
    except ImportError as error:
        return str(error).removeprefix("srt_ext.numpy is ")
    from ._numpy import available_cpu_kernels, cpu_kernels

    return f"{cpu_kernels()} (of {available_cpu_kernels()}), {get_num_threads()} threads"


@app.command()
def info() -> None:
    """Tells the version, the backends and what they run on, and why anything is missing."""
    table = Table(show_header=False, box=None)

    def row(name: str, value: str) -> None:
        table.add_row(name, Text(value))  # no markup: reasons hold brackets

    row("srt_ext", __version__)
    row("python", f"{platform.python_version()}, {platform.machine()}")
    row("torch", _version("torch"))
    if unavailable is not None:
        row("CPU", f"not available: {unavailable}")
    else:
        import torch

        ops = torch.ops.srt
        row(
            "CPU",
            f"{ops._cpu_kernels()} (of {ops._available_cpu_kernels()}), "
            f"{torch.get_num_threads()} threads",
        )
    row("CUDA", _cuda())
    row("srt_ext.numpy", _numpy())
    for package in ("timm", "transformers", "torchvision", "PIL", "safetensors", "sklearn"):
        row(package, _version(package))
    row("default model", _default_model())
    console.print(table)
