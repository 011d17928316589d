"""The features of a folder of images: decoded by workers, written atomically, resumable."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from ..srt import SRT, SRTOutput
from .common import Network
from .images import ImageError, open_image, to_pixels

LOCK_TIMEOUT = 10.0  # seconds; the workers of a run that was killed outlive it by 5


@dataclass
class Summary:
    """Counts of the images of a folder."""

    found: int
    there: int = 0  # finished by an earlier run
    changed: int = 0  # finished by an earlier run, but the image has changed since
    written: int = 0
    failed: int = 0
    bytes: int = 0  # written
    seconds: float = 0.0


class FolderError(RuntimeError):
    """An output that must not or cannot be written to; the message says why."""


def to_tensors(output: SRTOutput, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """``field`` [C, H', W'] and ``prefix`` [K, C] of one image, dense.

    Raises:
        ValueError: a value out of the range of ``dtype``.
    """
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
    """Makes the folder, and locks it until the last process with the handle ends.

    Raises:
        FolderError: it cannot be made, or another run is writing to it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise FolderError(f"{out} cannot be written: {error.strerror}") from None
    try:
        deadline = time.monotonic() + LOCK_TIMEOUT
        while not _try_lock(handle):
            if time.monotonic() > deadline:
                raise FolderError(f"another run is writing to {out}")
            time.sleep(0.1)
        yield
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


class Folder:
    """The images of a folder and its folders, and which of them are to be done.

    ``a/b.jpg`` becomes ``OUT/a/b.jpg.safetensors``, so that ``b.png`` has another name. Each file
    holds its settings as metadata. Finished ones are skipped; if any in ``out`` has other settings,
    nothing is done.

    Args:
        folder, images: as :func:`srt_ext.cli.images.find_images` finds them.
        out: a folder; it may be ``folder``, or lie in it.
        settings: everything that the features depend on.

    Attributes:
        summary: valid at any time, also after an exception.

    Raises:
        FolderError: ``out`` has features of other settings.
    """

    def __init__(
        self, folder: Path, images: list[Path], out: Path, settings: dict[str, str]
    ) -> None:
        self.out, self.settings = out, settings
        self.summary = Summary(len(images))
        targets = {out / f"{path.relative_to(folder)}.safetensors": path for path in images}
        finished = self._finished(set(targets))
        self._todo: list[tuple[Path, Path, dict[str, str]]] = []  # image, target, metadata
        for target, path in targets.items():
            source = {"photo": path.relative_to(folder).as_posix(), **_file_version(path)}
            before = finished.get(target)
            if before is not None and source.items() <= before.items():
                self.summary.there += 1
                continue
            self.summary.changed += before is not None
            self._todo.append((path, target, {**settings, **source}))

    def _finished(self, targets: set[Path]) -> dict[Path, dict[str, str]]:
        """The metadata of the files in ``out``, none of which may have other settings."""
        found = {}
        for path in sorted(self.out.rglob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    metadata = file.metadata() or {}
            except (OSError, SafetensorError):
                continue  # broken: made again if it is one of the targets
            if path not in targets and "srt_ext" not in metadata:
                continue  # not written by srt_ext
            others = [
                f"{key} {metadata.get(key, 'unknown')}, now {value}"
                for key, value in self.settings.items()
                if metadata.get(key) != value
            ]
            if others:
                raise FolderError(
                    f"{path} was made with other settings ({'; '.join(others)}): choose another "
                    f"--output, or remove the features in {self.out}"
                )
            found[path] = metadata
        return found

    def run(
        self,
        network: Network,
        srt: SRT,
        *,
        size: int,
        dtype: torch.dtype,
        workers: int,
        on_error: Callable[[str], object],
        progress: Callable[[], object],
    ) -> None:
        """Writes what is missing. Images that fail are reported to ``on_error`` and skipped.

        Raises:
            FolderError: ``out`` cannot be written, or a worker died.
        """
        start = time.perf_counter()
        loaded = _load(_Pixels([path for path, _, _ in self._todo], size), workers)
        try:
            for (path, target, metadata), pixels in zip(self._todo, loaded, strict=True):
                try:
                    if isinstance(pixels, str):
                        raise ImageError(pixels)
                    tensors = to_tensors(srt(network.image(pixels.numpy())), dtype)
                except (ValueError, RuntimeError, MemoryError) as error:
                    self.summary.failed += 1
                    # An ImageError names its file.
                    named = isinstance(error, ImageError)
                    on_error(str(error) if named else f"{path}: {error}")
                else:
                    self.summary.bytes += _write(target, tensors, metadata)
                    self.summary.written += 1
                progress()
        finally:
            self.summary.seconds += time.perf_counter() - start


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
