"""What the commands share: options, messages, and the model."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from .._library import unavailable
from ..options import Quality

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

# Of timm. The small model of srt_ext.demo replaces it where its weights are not available.
DEFAULT_MODEL = "vit_small_patch14_dinov2.lvd142m"
FIGURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp")

console = Console()

ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A model of timm, also local-dir:FOLDER or hf-hub:OWNER/NAME; or small, which comes "
        "with srt_ext and needs no network. Without it a DINOv2 ViT-S/14, or small where the "
        "weights of that cannot be had.",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="A .safetensors state dict of the model, its classifier may be another or missing; "
        "without it the pretrained weights are taken."
    ),
]
Views = Annotated[
    str | None,
    typer.Option(
        help="N views; or grid:RADIUS[:STEP], paper:RADIUS, lattice:N:RADIUS, "
        "sobol:N:RADIUS[:SEED], ring:N:RADIUS or best:N[:RADIUS], radius and step in pixels; "
        "+flip adds their mirror images."
    ),
]
Scale = Annotated[
    float | None,
    typer.Option(min=1, help="Factor by which the picture is enlarged before the views are made."),
]
QualityName = Annotated[
    Quality | None,
    typer.Option(
        "--quality",
        help="Preset of scale and views, in place of both. Without any of the three: balanced.",
    ),
]
Stride = Annotated[int, typer.Option(min=1, help="Pixels per output cell; 1 is pixel scale.")]
Size = Annotated[
    int, typer.Option(min=0, help="Longer side to which a larger picture is reduced; 0 keeps it.")
]
ViewBatch = Annotated[int, typer.Option(min=1, help="Views in one forward of the model.")]


# ---- messages -----------------------------------------------------------------------------------


def one_line(text: str) -> str:
    """With escapes for what would end the line, move the cursor or could not be encoded."""
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in _ESCAPED else char
        for char in text
    )


_ESCAPED = ("Cc", "Cs", "Zl", "Zp")  # control, surrogates (names that are no UTF-8), separators


def _diagnose(level: str, color: str, message: str) -> None:
    # No markup: a name may hold brackets.
    text = Text.assemble((f"{level}: ", color), one_line(message))
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)


note = partial(_diagnose, "note", "yellow")
error = partial(_diagnose, "error", "red")


def fatal(message: str) -> typer.Exit:
    """Prints an error; the result is to be raised."""
    error(message)
    return typer.Exit(1)


def echo(*lines: str) -> None:
    for line in lines:
        console.print(one_line(line), markup=False, highlight=False, soft_wrap=True)


# ---- errors -------------------------------------------------------------------------------------


class OutputError(RuntimeError):
    """An output that must not or cannot be written; the message says why, ``errno`` if it can."""

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno

    @classmethod
    def of(cls, path: Path, error: OSError) -> OutputError:
        return cls(f"{path} cannot be written: {error.strerror or error}", error.errno)


# torch, its libraries and ours say it in many ways.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can.?(no)?t allocate|bad_alloc|ALLOC_FAILED|failed to map segment"
    r"|can't start new thread|could not (create|execute) a primitive",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    kinds = (RuntimeError, OSError, ImportError)
    return isinstance(error, MemoryError) or (
        isinstance(error, kinds) and _OUT_OF_MEMORY.search(str(error)) is not None
    )


def describe(error: BaseException) -> str:
    """What happened, and for memory what to change."""
    text = str(error).partition("\n")[0].rpartition("DefaultCPUAllocator: ")[2]
    if is_out_of_memory(error):
        return (
            f"memory does not suffice ({text or type(error).__name__}): take a smaller --size or "
            "--scale, a larger --stride, a smaller --view-batch or fewer --views"
        )
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


@contextmanager
def user_errors() -> Iterator[None]:
    """Reports what a user can correct in one line, without a traceback. Decorates a command."""
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
            has_all = "pip install 'srt_ext[models]' has all that is needed"
            raise fatal(f"{reason}; {has_all}") from None
        raise


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function that shows how many are done."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    ) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done: progress.update(task, completed=done)


def timing(model: float, total: float) -> str:
    """Seconds of the model and of SRT, whose sum is ``total``."""
    share = 100 * (total - model) / max(total, 1e-9)
    return f"model {model:.2f} s, SRT {total - model:.3f} s ({share:.1f} %)"


# ---- checks before hours of work ----------------------------------------------------------------


def check_inputs(views: str | None, weights: Path | None) -> None:
    """Checks what can be checked before a model is loaded."""
    from ..views import parse

    if weights is not None and not weights.is_file():
        raise fatal(f"{weights} is no file")
    if views is not None:
        parse(views, patch=2**16)  # which has room for any number of views


def check_output(path: Path, suffixes: tuple[str, ...]) -> None:
    if path.suffix.lower() not in suffixes:
        raise fatal(f"--output must end in {' or '.join(suffixes)}; got {path}")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise fatal(f"the folder {folder} does not exist")
    there = path.exists()  # an OSError for a name that is too long
    if there and not path.is_file():
        raise fatal(f"{path} cannot be written: it is no regular file")
    for place in (folder, path) if there else (folder,):
        if not os.access(place, os.W_OK):
            raise fatal(f"{path} cannot be written: no permission for {place}")


# ---- output -------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, whose file replaces that of ``path`` if the block ends without an error.

    So there is always the file as it was before or the whole new one. The temporary file is hidden,
    its name is random and short. Raises an OutputError.
    """
    partial = path.with_name(f"{_partial_stem(path)}{secrets.token_hex(8)}.partial")
    try:
        partial.touch(exist_ok=False)  # O_EXCL: no file or link of others; mode as of any new file
        try:
            yield partial
            partial.replace(path)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError.of(path, error) from None


def remove_partials(paths: Iterable[Path]) -> None:
    """Removes what killed runs left of :func:`replacing`; no other run may write to ``paths``."""
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
    """A hash, because the name of ``path`` may leave no room for a suffix."""
    return f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}-"


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    drawing = BytesIO()  # of a full disk, some of matplotlib's formats raise AttributeErrors
    figure.savefig(drawing, dpi=dpi, format=path.suffix[1:].lower())
    with replacing(path.resolve()) as partial:
        partial.write_bytes(drawing.getvalue())


def utf8(name: str) -> str:
    """For the metadata of a file: the name of a path may be other bytes, which get escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# ---- the model ----------------------------------------------------------------------------------


class Network:
    """A frozen model, and images as it wants them; ``backbone`` has the seconds that it took.

    Arguments and errors are those of :func:`srt_ext.hub.load_timm` and
    :func:`srt_ext.backbones.describe`.
    """

    def __init__(self, name: str, weights: Path | None, layers: int | list[int] | None) -> None:
        import torch

        from ..backbones import TimedBackbone, describe
        from ..hub import load_timm

        self.name = name
        self.model, config = load_timm(name, weights)
        self.backbone = TimedBackbone(describe(self.model, layers))
        self._mean, self._std = (
            torch.tensor(config[k], dtype=torch.float32, device="cpu")[:, None, None]
            for k in ("mean", "std")
        )

    def image(self, pixels: np.ndarray) -> torch.Tensor:
        """pixels [H, W, 3] uint8 -> [1, 3, H, W] float32, normalised."""
        import torch

        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
        return (image - self._mean) / self._std

    def digest(self) -> str:
        """A hash of the weights, wherever they came from."""
        sha256 = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            sha256.update(tensor.numpy().tobytes())
        return sha256.hexdigest()[:16]


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Prints the warnings of this package in one line each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        note(str(warning.message).removeprefix("SRT: "))


def load_network(
    model: str | None, weights: Path | None, layers: int | list[int] | None
) -> Network:
    """The named model; by default DEFAULT_MODEL, or, with a note, the small one without a network.

    A named model is never replaced.
    """
    from ..hub import SMALL, PretrainedError

    try:
        return Network(DEFAULT_MODEL if model is None else model, weights, layers)
    except PretrainedError as reason:
        if model is not None:
            raise
        note(
            f"the weights of {DEFAULT_MODEL} cannot be had ({reason.reason}): using the small ViT "
            "that comes with srt_ext; --model or --weights choose another"
        )
    return Network(SMALL, None, layers)
