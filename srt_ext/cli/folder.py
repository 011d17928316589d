"""The features of a folder of images: decoded by workers, written atomically, resumable."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import typer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from ..srt import SRT, SRTOutput
from . import common
from .images import ImageError, open_image, to_pixels

LOCK_TIMEOUT = 10.0  # seconds; the workers of a run that was killed outlive it by 5


class FolderError(RuntimeError):
    """An output that must not or cannot be written to; the message says why."""


def to_tensors(output: SRTOutput, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """``field`` [C, H', W'] and ``prefix`` [K, C] of an image, dense, in the range of ``dtype``."""
    tensors = {}
    for name, tensor in output._asdict().items():
        if tensor is None:
            continue
        tensors[name] = tensor[0].to(dtype).contiguous()
        if dtype == torch.float16 and tensors[name].isinf().any() and not tensor.isinf().any():
            raise ValueError(
                f"float16 ends at 65504, {name} goes to {tensor.abs().max():g}: --dtype bfloat16"
            )
    return tensors


class _Pixels(Dataset[Any]):
    """Decoded images: [H, W, 3] uint8, or the reason why there is none.

    Tensors, not arrays: those would come through a pipe, on which a worker waits forever if the
    run is killed.
    """

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor | str:
        try:
            return torch.from_numpy(to_pixels(open_image(self.paths[index]), self.size))
        except ImageError as error:
            return str(error)


def _no_collate(item: Any) -> Any:
    return item


def _load(dataset: _Pixels, workers: int) -> Iterator[Any]:
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=_no_collate)
    try:
        yield from loader
    except RuntimeError as error:  # a worker was killed
        raise FolderError(
            f"a worker died ({error}). Too little memory, or /dev/shm? Take fewer --workers"
        ) from error


@contextmanager
def lock_folder(out: Path) -> Iterator[None]:
    """Makes the folder, and locks it until the last process with the handle ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise FolderError(f"{out} cannot be written: {error.strerror}") from None
    deadline = time.monotonic() + LOCK_TIMEOUT
    try:
        with suppress(OSError):  # a file system without locks
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise FolderError(f"another run is writing to {out}") from None
                    time.sleep(0.1)
        yield
    finally:
        os.close(handle)


def write_folder(
    folder: Path,
    images: list[Path],
    out: Path,
    settings: dict[str, str],
    network: common.Network,
    srt: SRT,
    size: int,
    dtype: torch.dtype,
    workers: int,
) -> None:
    """Writes the features of images in a folder, with a progress bar and, at its end, a summary.

    ``a/b.jpg`` becomes ``OUT/a/b.jpg.safetensors``, so that ``b.png`` has another name. Each file
    holds its settings as metadata. Finished ones are skipped; if any in ``out`` has other settings,
    nothing is done. Images that fail are reported and skipped.

    ``out`` may be ``folder``, or lie in it. ``settings``: everything that the features depend on.
    Raises a FolderError if ``out`` has features of other settings or cannot be written, or a worker
    died; typer.Exit if images failed, or it was interrupted.
    """
    targets = {out / f"{path.relative_to(folder)}.safetensors": path for path in images}
    finished = _finished(out, targets, settings)
    todo: list[tuple[Path, Path, dict[str, str]]] = []  # image, target, metadata
    for target, path in targets.items():
        source = {"photo": path.relative_to(folder).as_posix(), **_file_version(path)}
        if target not in finished or not source.items() <= finished[target].items():
            todo.append((path, target, {**settings, **source}))
    again = sum(target in finished for _, target, _ in todo)  # the image has changed since
    there, failed, written = len(images) - len(todo), 0, []
    start = time.perf_counter()
    try:
        loaded = _load(_Pixels([path for path, _, _ in todo], size), workers)
        with common.progress_bar("pictures", len(images)) as progress:
            progress(there)
            for (path, target, metadata), pixels in zip(todo, loaded, strict=True):
                try:
                    if isinstance(pixels, str):
                        raise ImageError(pixels)
                    tensors = to_tensors(srt(network.image(pixels.numpy())), dtype)
                except (ValueError, RuntimeError, MemoryError) as error:
                    failed += 1
                    # An ImageError names its file.
                    named = isinstance(error, ImageError)
                    common.error(str(error) if named else f"{path}: {error}")
                else:
                    written.append(_write(target, tensors, metadata))
                progress(there + failed + len(written))
    except KeyboardInterrupt:
        common.error("interrupted; the same command goes on")
        raise typer.Exit(130) from None
    finally:
        changed = f" ({again} had changed since)" if again else ""
        common.echo(
            f"{len(images)} pictures: {len(written)} written{changed}, "
            f"{there} were there, {failed} failed",
            f"{sum(written) / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s, "
            f"{network.backbone.seconds:.1f} s of them in the model",
            f"wrote to {out}",
        )
    if failed:
        raise typer.Exit(1)


def _finished(out: Path, targets: Any, settings: dict[str, str]) -> dict[Path, dict[str, str]]:
    """The metadata of the files in ``out``, none of which may have other settings."""
    found = {}
    for path in sorted(out.rglob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
        except (OSError, SafetensorError):
            continue  # broken: made again if it is one of the targets
        if path not in targets and "srt_ext" not in metadata:
            continue  # not written by srt_ext
        others = [
            f"{key} {metadata.get(key, 'unknown')}, now {value}"
            for key, value in settings.items()
            if metadata.get(key) != value
        ]
        if others:
            raise FolderError(
                f"{path} was made with other settings ({'; '.join(others)}): choose another "
                f"--output, or remove the features in {out}"
            )
        found[path] = metadata
    return found


def _file_version(path: Path) -> dict[str, str]:
    """Size and time, which differ after a change."""
    try:
        state = path.stat()
    except OSError:  # gone, or a broken link: reported when it is opened
        return {"bytes": "", "modified": ""}
    return {"bytes": str(state.st_size), "modified": str(state.st_mtime_ns)}


def save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """A .safetensors file with the usual permissions: its library makes it private."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)


def _write(target: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> int:
    """Writes under another name first, so that a target is always complete. Returns its bytes."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save(tensors, partial, metadata)
        partial.replace(target)
    except (OSError, SafetensorError) as error:  # a full disk, which is full for the others, too
        raise FolderError(f"{target} cannot be written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)
    return target.stat().st_size
