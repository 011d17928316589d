"""Options, messages and model loading that the commands share."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from .._library import unavailable
from .._messages import describe, is_out_of_memory, one_line
from ..options import Quality

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

    from ..extraction import Network

# A model of timm. If its weights are not available, the small model of srt_ext.demo is used.
DEFAULT_MODEL = "vit_small_patch14_dinov2.lvd142m"
LOCK_TIMEOUT = 10.0  # seconds; workers of a killed run exit up to 5 s later
FIGURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp")

console = Console()

ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Name of a timm model, local-dir:FOLDER, hf-hub:OWNER/NAME, or small, which is "
        "included and needs no download. Default: a DINOv2 ViT-S/14, or small if its weights "
        "cannot be downloaded.",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="A .safetensors state dict of the model, or of a module that contains it. The "
        "classifier may differ or be missing. Default: the pretrained weights."
    ),
]
Views = Annotated[
    str | None,
    typer.Option(
        help="A number of views, N; or a design: grid:RADIUS[:STEP], paper:RADIUS, "
        "lattice:N:RADIUS, sobol:N:RADIUS[:SEED], ring:N:RADIUS, best:N[:RADIUS], moore:D[,D...], "
        "neumann:D[,D...] (radius, step and D in pixels) or patches:N:HxW[:FRACTION[:SEED]] (H and "
        "W in tokens). A suffix +flip adds horizontally mirrored views, +vflip vertically mirrored "
        "ones."
    ),
]
Scale = Annotated[
    float | None,
    typer.Option(
        min=1, help="Factor by which the image is enlarged before the views are computed."
    ),
]
QualityName = Annotated[
    Quality | None,
    typer.Option(
        "--quality",
        help="Preset of --scale and --views. Default: balanced, unless one of them is given.",
    ),
]
Stride = Annotated[int, typer.Option(min=1, help="Pixels per output cell; 1 is pixel scale.")]
Size = Annotated[
    int,
    typer.Option(
        min=0,
        help="Images whose longer side has more pixels are reduced to this size; 0: never.",
    ),
]
ViewBatch = Annotated[int, typer.Option(min=1, help="Views in one forward pass of the model.")]


# ---- messages -----------------------------------------------------------------------------------


def _diagnose(level: str, color: str, message: str) -> None:
    # No markup: names may contain brackets.
    text = Text.assemble((f"{level}: ", color), one_line(message))
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)


note = partial(_diagnose, "note", "yellow")
error = partial(_diagnose, "error", "red")


def fatal(message: str) -> typer.Exit:
    """Prints an error and returns the exception to raise."""
    error(message)
    return typer.Exit(1)


def echo(*lines: str) -> None:
    for line in lines:
        console.print(one_line(line), markup=False, highlight=False, soft_wrap=True)


# ---- errors -------------------------------------------------------------------------------------


class OutputError(RuntimeError):
    """An output must not or cannot be written. ``errno``: of the OSError, if any."""

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno

    @classmethod
    def of(cls, path: Path, error: OSError) -> OutputError:
        return cls(f"{path} cannot be written: {error.strerror or error}", error.errno)


@contextmanager
def user_errors() -> Iterator[None]:
    """Reports errors that a user can correct as one line, without a traceback."""
    if unavailable is not None:
        raise fatal(unavailable)
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception as reason:
        from ..hub import ModelError

        if isinstance(reason, (ModelError, OutputError, OSError)) and not is_out_of_memory(reason):
            raise fatal(str(reason)) from None
        if isinstance(reason, ValueError) or is_out_of_memory(reason):
            raise fatal(describe(reason)) from None
        if isinstance(reason, ImportError):
            extra = "ray" if reason.name in ("pyarrow", "ray") else "models"
            raise fatal(f"{reason}; run pip install 'srt_ext[{extra}]'") from None
        raise


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar; yields a function that sets the number of finished items."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    ) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done: progress.update(task, completed=done)


def image_size(pixels: np.ndarray, original: tuple[int, int]) -> str:
    """The size of pixels [H, W, 3] as text, and the ``original`` (width, height) if reduced."""
    height, width = pixels.shape[:2]
    text = f"image {width} x {height} pixels (width x height)"
    if (width, height) != original:
        text += " reduced by --size from {} x {}".format(*original)
    return text


def timing(model: float, total: float) -> str:
    """The seconds of the model and of SRT, which add up to ``total``, as text."""
    share = 100 * (total - model) / max(total, 1e-9)
    return f"model {model:.2f} s, SRT {total - model:.3f} s ({share:.1f} %)"


# ---- checks before the work starts ---------------------------------------------------------------


def check_inputs(views: str | None, weights: Path | None) -> None:
    """Checks options before a model is loaded."""
    from ..hub import check_file
    from ..views import parse

    if weights is not None:
        check_file(weights)
    if views is not None:
        parse(views, patch=2**16)  # a patch that is large enough for any number of views


def check_output(path: Path, suffixes: tuple[str, ...], inputs: Iterable[Path] = ()) -> None:
    """Exits with an error if ``path`` cannot be written, or would replace one of ``inputs``."""
    if path.suffix.lower() not in suffixes:
        allowed = " or ".join([", ".join(suffixes[:-1]), suffixes[-1]])
        raise fatal(f"--output must end in {allowed}; got {path}")
    there = path.exists()  # raises an OSError if the name is too long
    target = Path(os.path.realpath(path))  # Path.resolve raises a RuntimeError before Python 3.13
    if target.is_symlink():
        raise fatal(f"{path} cannot be written: its symbolic links form a loop")
    folder = target.parent
    if not folder.is_dir():
        raise fatal(f"the folder {folder} does not exist")
    if there and any(image.exists() and path.samefile(image) for image in inputs):
        raise fatal(f"--output must not be an input image, which it would replace; got {path}")
    if there and not path.is_file():
        raise fatal(f"{path} cannot be written: it is not a regular file")
    for place in (folder, path) if there else (folder,):
        if not os.access(place, os.W_OK):
            raise fatal(f"{path} cannot be written: no permission for {place}")


def other_settings(before: dict[str, str], now: dict[str, str]) -> str:
    """The settings of an output that differ, as text; empty if none differs."""
    return "; ".join(
        f"{name} {before.get(name, 'unknown')}, now {value}"
        for name, value in now.items()
        if before.get(name) != value
    )


# ---- output -------------------------------------------------------------------------------------


@contextmanager
def lock_folder(out: Path) -> Iterator[None]:
    """Creates and locks the folder; the lock ends with the last process that has the handle."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise OutputError.of(out, error) from None
    deadline = time.monotonic() + LOCK_TIMEOUT
    try:
        with suppress(OSError):  # some file systems do not support locks
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise OutputError(f"another run is writing to {out}") from None
                    time.sleep(0.1)
        if not os.access(out, os.W_OK):
            raise OutputError(f"{out} cannot be written: no permission")
        yield
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path, which replaces ``path`` if the block ends without an error.

    ``path`` is always the old file or the complete new file. The temporary file is in the same
    folder, hidden, with a short random name. Raises an OutputError.
    """
    partial = path.with_name(f"{_partial_stem(path)}{secrets.token_hex(8)}.partial")
    try:
        partial.touch(exist_ok=False)  # O_EXCL: never an existing file or link
        try:
            yield partial
            partial.replace(path)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError.of(path, error) from None


def remove_partials(paths: Iterable[Path]) -> None:
    """Removes temporary files of :func:`replacing` from killed runs.

    No other run may write to ``paths`` at the same time.
    """
    stems: dict[Path, set[str]] = {}
    for path in paths:
        stems.setdefault(path.parent, set()).add(_partial_stem(path))
    for folder, ours in stems.items():
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                stem = re.sub(r"[0-9a-f]{16}\.partial$", "", entry.name)
                if stem != entry.name and stem in ours and entry.is_file(follow_symlinks=False):
                    os.unlink(entry)


def _partial_stem(path: Path) -> str:
    """The start of temporary names for ``path``: a hash, because names have a maximum length."""
    return f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}-"


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    drawing = BytesIO()  # on a full disk, matplotlib raises AttributeErrors for some formats
    figure.savefig(drawing, dpi=dpi, format=path.suffix[1:].lower())
    with replacing(path.resolve()) as partial:
        partial.write_bytes(drawing.getvalue())


# ---- the model ----------------------------------------------------------------------------------


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Prints warnings as notes of one line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        note(str(warning.message).removeprefix("SRT: "))


def load_network(
    model: str | None, weights: Path | None, layers: int | list[int] | None
) -> Network:
    """Loads the named model; None: DEFAULT_MODEL.

    If the weights of the default model are not available, the small model is used and a note is
    printed. A named model is never replaced.
    """
    from ..extraction import Network
    from ..hub import SMALL, PretrainedError

    try:
        with warnings_as_notes():
            return Network.load(DEFAULT_MODEL if model is None else model, weights, layers)
    except PretrainedError as reason:
        if model is not None:
            raise
        note(
            f"the weights of {DEFAULT_MODEL} are not available ({reason.reason}): using the "
            "included small ViT; select another model with --model or --weights"
        )
    return Network.load(SMALL, layers=layers)
