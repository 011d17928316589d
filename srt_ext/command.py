"""The command: ``srt-ext show``, ``features`` and ``info``."""

from __future__ import annotations

import os
import platform
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from . import __version__
from ._library import cuda_unavailable, unavailable

if TYPE_CHECKING:
    import torch

# A small ViT with published weights.
DEFAULT_MODEL = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Dense features from frozen Vision Transformers (SRT), by fast kernels.",
)
console = Console()

Photo = Annotated[Path, typer.Argument(help="A picture, of any kind that Pillow reads.")]
ModelName = Annotated[str, typer.Option("--model", help="A model of timm.")]
Weights = Annotated[
    Path | None,
    typer.Option(help="A .safetensors state dict; without it timm's pretrained weights are taken."),
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
LayerIndex = Annotated[
    int | None,
    typer.Option(
        "--layer", help="The block or stage to look at, from 0, or from the end; or else the last."
    ),
]
ViewBatch = Annotated[int, typer.Option(min=1, help="Views in one forward of the model.")]


def fail(message: str) -> typer.Exit:
    """Says what is wrong on stderr; to be raised."""
    text = Text.assemble(("error: ", "red"), message)  # no markup: a name may hold brackets
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)
    return typer.Exit(1)


def open_picture(path: Path, size: int) -> Any:
    """An RGB picture, upright, its longer side at most ``size`` (0: as it is).

    What is transparent becomes white; 16 bits a pixel are reduced to 8.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise fail(f"{path} does not exist") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise fail(f"{path} is no readable picture: {error}") from None
    if picture.mode in ("F", "I") or picture.mode.startswith("I;"):
        depth = np.asarray(picture, dtype=np.float64)
        if picture.mode == "F" or depth.min() < 0 or depth.max() > 65535:
            raise fail(f"{path} is no picture of 8 or 16 bits: its values go to {depth.max():g}")
        picture = Image.fromarray(np.rint(depth / 257).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("RGB")
    if size:
        picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    return picture


class Features:
    """One picture through one model: the plain tokens, the SRT field, and the time of each part."""

    def __init__(
        self,
        photo: Path,
        model: str,
        weights: Path | None,
        views: str,
        stride: int,
        size: int,
        view_batch: int,
        layer: int | None,
        noise: bool = False,
    ) -> None:
        if unavailable is not None:
            raise fail(unavailable)
        import torch

        from .backbones import ModelError, Timed, describe, load_timm
        from .views import resolve
        from .wrapper import SRT, SRTOutput

        # What can be wrong and is quick to see, before a model is loaded.
        if weights is not None and not weights.is_file():
            raise fail(f"{weights} is no file")
        try:
            offsets, _ = resolve(views)
        except ValueError as error:
            raise fail(str(error)) from None
        self.picture = open_picture(photo, size)
        try:
            vit, config = load_timm(model, weights)
        except ModelError as error:
            raise fail(str(error)) from None

        pixels = torch.from_numpy(np.asarray(self.picture).copy()).permute(2, 0, 1)[None] / 255
        mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
        image = (pixels - mean) / std
        try:
            backbone = Timed(describe(vit, layer))
            self.plain: torch.Tensor = SRT(
                backbone, torch.zeros(1, 2), stride=backbone.patch, upsample="nearest"
            )(image).field
            srt = SRT(backbone, views, stride=stride, view_batch=view_batch)
            backbone.seconds = 0.0
            with Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=console,
            ) as bar:
                task = bar.add_task("views", total=len(offsets))
                start = time.perf_counter()

                def progress(done: int) -> None:
                    bar.update(task, completed=done)

                self.noise: torch.Tensor | None = None
                if noise:
                    moments = srt.moments(image, progress)
                    self.noise = moments.var[0].float().sum(0).sqrt()
                    self.output = SRTOutput(moments.mean, moments.prefix)
                else:
                    self.output = srt(image, progress)
                seconds = time.perf_counter() - start
        except ValueError as error:
            raise fail(str(error)) from None
        self.model_seconds = backbone.seconds
        self.srt_seconds = seconds - self.model_seconds
        self.patch = backbone.patch
        self.views = len(offsets)

    def report(self, written: Path) -> None:
        shape = " x ".join(str(n) for n in self.output.field.shape[1:])
        width, height = self.picture.size
        share = 100 * self.srt_seconds / (self.srt_seconds + self.model_seconds)
        console.print(
            f"picture {width} x {height}, {self.views} views, field {shape}\n"
            f"model {self.model_seconds:.2f} s, SRT {self.srt_seconds:.3f} s ({share:.1f} %)\n"
            f"wrote {written}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def check_output(path: Path, suffixes: tuple[str, ...]) -> None:
    """Before hours of work are lost on it."""
    if path.suffix.lower() not in suffixes:
        raise fail(f"--output must end in {' or '.join(suffixes)}; got {path}")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise fail(f"the folder {folder} does not exist")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise fail(f"{path} cannot be written")


@app.command()
def show(
    photo: Photo,
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture to write.")] = Path(
        "srt.png"
    ),
    model: ModelName = DEFAULT_MODEL,
    weights: Weights = None,
    views: Views = "grid:3",
    stride: Stride = 1,
    size: Size = 448,
    view_batch: ViewBatch = 8,
    layer: LayerIndex = None,
    noise: Annotated[
        bool, typer.Option("--noise", help="Also draw how far the views differ: the noise map.")
    ] = False,
) -> None:
    """Draws a photograph, its plain tokens and its SRT field, in one PCA basis, side by side."""
    check_output(output, (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp"))
    features = Features(photo, model, weights, views, stride, size, view_batch, layer, noise)
    from .visualize import Colours, brightness, enlarge, side_by_side

    if features.plain[0, 0].numel() < 3:
        raise fail(f"{photo} has fewer than 3 tokens: no colours can be made of them")
    colours = Colours(features.plain)
    width, height = features.picture.size
    blocks = enlarge(colours(features.plain), features.patch, (height, width))
    cells = enlarge(colours(features.output.field), (stride, stride), (height, width))
    panels = [
        ("input", np.asarray(features.picture, dtype=np.float32) / 255),
        (f"tokens of {model.split('.')[0]}", blocks),
        (f"SRT, {features.views} views", cells),
    ]
    if features.noise is not None:
        grey = enlarge(brightness(features.noise), (stride, stride), (height, width))
        panels.append(("noise: spread of the views", grey))
    side_by_side(panels, output)
    features.report(output)


@app.command()
def features(
    photo: Photo,
    output: Annotated[Path, typer.Option("--output", "-o", help="A .npz or .safetensors file.")],
    model: ModelName = DEFAULT_MODEL,
    weights: Weights = None,
    views: Views = "grid:3",
    stride: Stride = 1,
    size: Size = 448,
    view_batch: ViewBatch = 8,
    layer: LayerIndex = None,
) -> None:
    """Writes the SRT field of a photograph: `field` [C, H', W'] and `prefix` [K, C]."""
    check_output(output, (".npz", ".safetensors"))
    made = Features(photo, model, weights, views, stride, size, view_batch, layer)
    tensors = {"field": made.output.field[0].contiguous()}
    if made.output.prefix is not None:
        tensors["prefix"] = made.output.prefix[0].contiguous()
    if output.suffix.lower() == ".npz":
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
        with output.open("wb") as file:  # savez would add its own suffix to .NPZ
            np.savez(file, **arrays)
    else:
        from safetensors.torch import save_file

        save_file(
            tensors,
            output,
            metadata={"model": model, "views": views, "stride": str(stride), "photo": photo.name},
        )
    made.report(output)


def _version(package: str) -> str:
    try:
        return str(import_module(package).__version__)
    except Exception as error:  # a broken package breaks in its own way
        return f"not available: {type(error).__name__}: {str(error).partition(chr(10))[0]}"


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
    console.print(table)
