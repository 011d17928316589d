"""``srt-ext features``: writes the fields of an image, a folder or a data set to files."""

from __future__ import annotations

import os
import random
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import typer

from .. import __version__
from ..images import find_images, open_image, to_pixels, utf8
from ..options import Quality
from . import common

if TYPE_CHECKING:
    from ..extraction import Extraction


class DType(str, Enum):
    """Data types of features in a file."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Engine(str, Enum):
    """Engines that run the extraction of many images."""

    ray = "ray"


class Request(NamedTuple):
    """The options of the model and of SRT."""

    model: str | None
    weights: Path | None
    layer: int | None
    views: str | None
    scale: float | None
    quality: Quality | None
    stride: int
    view_batch: int
    size: int
    dtype: DType
    model_dtype: DType

    def load(self) -> Extraction:
        """Loads the model and checks the options that depend on it."""
        import torch

        from ..extraction import Extraction
        from ..srt import SRT

        network = common.load_network(self.model, self.weights, self.layer)
        network.model.to(getattr(torch, self.model_dtype.value))
        with common.warnings_as_notes():
            srt = SRT(network.backbone, **self.srt_arguments())
        in_dtype = "" if self.model_dtype is DType.float32 else f" in {self.model_dtype.value}"
        settings = {
            "srt_ext": __version__,
            "model": utf8(network.name) + in_dtype,
            "weights": network.digest(),
            "views": self.views or str(len(srt.views.offsets)),
            "scale": f"{srt.scale:g}",
            "stride": str(self.stride),
            "size": str(self.size),
            "layer": "last" if self.layer is None else str(self.layer),
            "dtype": self.dtype.value,
        }
        dtype = getattr(torch, self.dtype.value)
        return Extraction(network, srt, self.size, dtype, settings)

    def srt_arguments(self) -> dict[str, Any]:
        names = ("views", "scale", "quality", "stride", "view_batch")
        return {name: getattr(self, name) for name in names}


@common.user_errors()
def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="An image file, or a folder of images, including subfolders. With --engine ray "
            "also a glob, a Parquet file with paths or bytes, or tar shards (WebDataset); each a "
            "path or a URL.",
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            help="For an image: a .npz or .safetensors file. For a folder: a folder for "
            ".safetensors files. With --engine ray: a folder or a URL for Parquet files.",
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
            help="Index of a block or stage; negative: from the end. Default: the last layer."
        ),
    ] = None,
    dtype: Annotated[DType, typer.Option(help="Data type of the output.")] = DType.float32,
    model_dtype: Annotated[
        DType, typer.Option(help="Data type of the model; bfloat16 is fast on GPUs.")
    ] = DType.float32,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Use only this number of images, from the start of the source."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the number of images, the settings, and the expected size and time, "
            "measured on a few images; write nothing.",
        ),
    ] = False,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed",
            help="Retry images that failed before. Without --engine ray they are always retried. "
            "(--engine ray)",
        ),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Processes that decode the images of a folder; 0: the main process. Default: 2.",
        ),
    ] = None,
    engine: Annotated[
        Engine | None,
        typer.Option(help="ray: run on Ray Data, for data sets of any size. Default: one process."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Address of a Ray cluster, or auto. Default: RAY_ADDRESS, or a temporary cluster "
            "on this machine. (--engine ray)"
        ),
    ] = None,
    actors: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes that hold the model. Default: one per GPU, or one per two CPUs. "
            "(--engine ray)",
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images per task; images of one size are processed in one batch. Default: 16, or "
            "fewer if their fields are large. (--engine ray)",
        ),
    ] = None,
    rows_per_file: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Minimum number of images per file; the images of an unfinished file are computed "
            "again. Default: as many as yield 256 MB. (--engine ray)",
        ),
    ] = None,
    pca: Annotated[
        str | None,
        typer.Option(
            help="Project the fields onto this number of principal components, or the components "
            "in the pca.npy of another output. (--engine ray)"
        ),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(
            help="Column of a Parquet file with the images: paths, bytes, or both. Default: bytes, "
            "path or image. (--engine ray)"
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            help="Column of a Parquet file with the names of the images. Default: key, or the "
            "paths. (--engine ray)"
        ),
    ] = None,
) -> None:
    """Writes the SRT field of images: `field` [C, H', W'] and `prefix` [K, C].

    FOLDER/a/b.jpg is written to OUTPUT/a/b.jpg.safetensors. With --engine ray, the fields are rows
    of OUTPUT/data/*.parquet. Re-running resumes: finished images are skipped. An OUTPUT with
    features of other settings is an error.

    Example: srt-ext features photos -o features --stride 4 --dtype float16
    """
    common.check_inputs(views, weights)
    asked: Any = {"stride": stride, "view_batch": view_batch, "size": size}
    asked |= {"dtype": dtype, "model_dtype": model_dtype}
    request = Request(model, weights, layer, views, scale, quality, **asked)
    for_ray = {
        "--address": address,
        "--actors": actors,
        "--batch": batch,
        "--rows-per-file": rows_per_file,
        "--pca": pca,
        "--column": column,
        "--key": key,
        "--retry-failed": retry_failed or None,
    }
    if engine is Engine.ray:
        if workers is not None:
            raise common.fatal("--workers must be omitted with --engine ray; use --actors")
        from ..ray.sources import find
        from .dataset import Cluster, extract

        found = find(source, limit=limit, without=output, column=column, key=key)
        cluster = Cluster(address, actors, batch, rows_per_file)
        extract(found, output, request, cluster, pca, dry_run, retry_failed)
        return
    if given := [name for name, value in for_ray.items() if value is not None]:
        raise common.fatal(f"{given[0]} requires --engine ray")
    if Path(source).is_dir():
        _folder(
            Path(source), Path(output), request, 2 if workers is None else workers, limit, dry_run
        )
    else:
        _image(Path(source), Path(output), request, dry_run)


def _folder(
    folder: Path, output: Path, request: Request, workers: int, limit: int | None, dry_run: bool
) -> None:
    if output.suffix.lower() in (".npz", ".safetensors") or output.is_file():
        raise common.fatal(f"--output must be a folder for a folder of images; got {output}")
    if (output / "manifest.json").is_file():
        raise common.fatal(f"{output} is an output of --engine ray: choose another --output")
    from .folder import list_tasks, sizes, write_folder

    inside = None if os.path.realpath(output) == os.path.realpath(folder) else output
    found = find_images(folder, nested=True, without=inside)
    found = found._replace(files=found.files[:limit])
    extraction = request.load()
    if dry_run:
        from .plan import TIMED, print_plan

        count = len(found.files)
        done = count - len(list_tasks(folder, found, output, extraction.settings))
        timed = random.Random(0).sample(found.files, min(1 + TIMED, count))
        print_plan(count, True, done, extraction.settings, sizes(timed, extraction))
        return
    with common.lock_folder(output):
        write_folder(folder, found, output, extraction, workers)


def _image(photo: Path, output: Path, request: Request, dry_run: bool) -> None:
    common.check_output(output, (".npz", ".safetensors"))
    if output.suffix.lower() == ".npz" and request.dtype is DType.bfloat16:
        raise common.fatal(f"--dtype bfloat16 is not supported in .npz files; got {output}")
    from ..extraction import to_tensors
    from .folder import save, sizes

    image = open_image(photo)
    pixels = to_pixels(image, request.size)
    extraction = request.load()
    network, srt, _, dtype, settings = extraction
    if dry_run:
        from .plan import print_plan

        print_plan(1, True, 0, settings, sizes([photo, photo], extraction))
        return
    count = len(srt.views.offsets)
    with common.progress_bar("views", count) as progress:
        start = time.perf_counter()
        result = srt(network.image(pixels), progress)
        seconds = time.perf_counter() - start
    tensors = to_tensors(result, dtype)
    with common.replacing(output.resolve()) as partial:
        if output.suffix.lower() == ".npz":
            arrays: Any = {name: tensor.numpy() for name, tensor in tensors.items()}
            with partial.open("wb") as file:  # savez would append a suffix to a path
                np.savez(file, **arrays)
        else:
            save(tensors, partial, {**settings, "photo": utf8(photo.name)})
    shape = " x ".join(str(n) for n in tensors["field"].shape)
    common.echo(
        common.image_size(pixels, image.size),
        f"model {settings['model']}, scale {srt.scale:g}, {count} views",
        f"field {shape} (C x H x W)",
        common.timing(network.backbone.seconds, seconds),
        f"wrote {output}",
    )
