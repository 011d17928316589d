"""``srt-ext features``: the fields of an image or of a folder, in files."""

from __future__ import annotations

import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from .. import __version__
from ..images import find_images, open_image, to_pixels
from . import common


class DType(str, Enum):
    """Data types of features in a file."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


@common.user_errors()
def command(
    photo: Annotated[
        Path,
        typer.Argument(
            help="A picture that Pillow can read, or a folder of pictures, with its subfolders."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="A .npz or .safetensors file. For a folder: a folder for .safetensors files.",
        ),
    ],
    model: common.ModelName = None,
    weights: common.Weights = None,
    views: common.Views = None,
    scale: common.Scale = None,
    quality: common.QualityName = None,
    stride: common.Stride = 1,
    size: common.Size = 448,
    view_batch: common.ViewBatch = 8,
    layer: Annotated[
        int | None,
        typer.Option(
            help="Index of a block or stage; a negative one counts from the end. Default: the last."
        ),
    ] = None,
    dtype: Annotated[DType, typer.Option(help="Data type of the output.")] = DType.float32,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that decode the pictures of a folder; 0: none.")
    ] = 2,
) -> None:
    """Writes the SRT field of photographs: `field` [C, H', W'] and `prefix` [K, C].

    FOLDER/a/b.jpg becomes OUTPUT/a/b.jpg.safetensors. The same command resumes a run that was
    stopped: it skips the files that are done. An OUTPUT with files of other settings is an error.
    """
    many = photo.is_dir()
    if not many:
        common.check_output(output, (".npz", ".safetensors"))
        if output.suffix.lower() == ".npz" and dtype is DType.bfloat16:
            raise common.fatal(f"--dtype bfloat16 does not exist in .npz files; got {output}")
    elif output.suffix.lower() in (".npz", ".safetensors") or output.is_file():
        raise common.fatal(f"--output must be a folder for the pictures of a folder; got {output}")
    import torch

    from ..extraction import to_tensors
    from ..srt import SRT
    from .folder import Extraction, lock_folder, save, write_folder

    common.check_inputs(views, weights)
    if many:
        inside = None if output.resolve() == photo.resolve() else output
        found = find_images(photo, nested=True, without=inside)
    else:
        pixels = to_pixels(open_image(photo), size)
    network = common.load_network(model, weights, layer)
    setting: Any = {"scale": scale, "quality": quality}
    with common.warnings_as_notes():
        srt = SRT(network.backbone, views, stride=stride, view_batch=view_batch, **setting)
    count = len(srt.views.offsets)
    torch_dtype = getattr(torch, dtype.value)
    settings = {
        "srt_ext": __version__,
        "model": common.utf8(network.name),
        "weights": network.digest(),
        "views": views or str(count),
        "scale": f"{srt.scale:g}",
        "stride": str(stride),
        "size": str(size),
        "layer": "last" if layer is None else str(layer),
        "dtype": dtype.value,
    }
    if many:
        with lock_folder(output):
            extraction = Extraction(network, srt, size, torch_dtype, settings)
            write_folder(photo, found, output, extraction, workers)
        return
    with common.progress_bar("views", count) as progress:
        start = time.perf_counter()
        result = srt(network.image(pixels), progress)
        seconds = time.perf_counter() - start
    tensors = to_tensors(result, torch_dtype)
    with common.replacing(output.resolve()) as partial:
        if output.suffix.lower() == ".npz":
            arrays: Any = {name: tensor.numpy() for name, tensor in tensors.items()}
            with partial.open("wb") as file:  # given a path, savez would append a suffix
                np.savez(file, **arrays)
        else:
            save(tensors, partial, {**settings, "photo": common.utf8(photo.name)})
    height, width = pixels.shape[:2]
    shape = " x ".join(str(n) for n in tensors["field"].shape)
    common.echo(
        f"picture {width} x {height}, scale {srt.scale:g}, {count} views, field {shape}",
        common.timing(network.backbone.seconds, seconds),
        f"wrote {output}",
    )
