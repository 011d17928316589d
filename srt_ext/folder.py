"""The features of a folder of pictures: decoded by workers, each file whole, resumable."""

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

from .pictures import Network, PictureError, open_picture, pixels_of
from .wrapper import SRT, SRTOutput

# Seconds to wait for another run's lock: workers outlive one that was killed by 5.
PATIENCE = 10.0


@dataclass
class Summary:
    """What became of the pictures of a folder."""

    found: int
    there: int = 0  # finished by an earlier run
    changed: int = 0  # finished by an earlier run, but the picture is another one now
    written: int = 0
    failed: int = 0
    bytes: int = 0  # written
    seconds: float = 0.0


class FolderError(RuntimeError):
    """An output that must not or cannot be written to; the message says why."""


def tensors_of(output: SRTOutput, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """``field`` [C, H', W'] and ``prefix`` [K, C] of one picture, dense.

    Raises:
        ValueError: a value beyond those of ``dtype``.
    """
    made = {}
    for name, tensor in output._asdict().items():
        if tensor is None:
            continue
        made[name] = tensor[0].to(dtype).contiguous()
        if dtype == torch.float16 and made[name].isinf().any() and not tensor.isinf().any():
            raise ValueError(
                f"float16 ends at 65504, {name} goes to {tensor.abs().max():g}: --dtype bfloat16"
            )
    return made


class _Pixels(Dataset[Any]):
    """Pictures decoded: [H, W, 3] uint8, or in words why there is none.

    Tensors and not arrays: those would come through a pipe, on which a worker waits for ever if the
    run was killed.
    """

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor | str:
        try:
            return torch.from_numpy(pixels_of(open_picture(self.paths[index]), self.size))
        except PictureError as error:
            return str(error)


def _as_it_is(item: Any) -> Any:
    return item


def _locked(handle: int) -> bool:
    """Locks an open folder, until the last process that has the handle ends."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Makes the folder; meanwhile no other run writes there, however this one ends.

    Raises:
        FolderError: it cannot be made, or another run is writing to it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise FolderError(f"{out} cannot be written: {error.strerror}") from None
    try:
        start = time.monotonic()
        while not _locked(handle):
            if time.monotonic() > start + PATIENCE:
                raise FolderError(f"another run is writing to {out}")
            time.sleep(0.1)
        yield
    finally:
        os.close(handle)


class Folder:
    """Pictures of a folder and of those in it, and which of them are to be done.

    ``a/b.jpg`` becomes ``OUT/a/b.jpg.safetensors``, so that ``b.png`` has another name. Each file
    tells its settings. Finished ones are skipped; if any in ``out`` has others, nothing is done.

    Args:
        folder, pictures: those of it, as :func:`srt_ext.pictures.find_pictures` finds them.
        out: a folder; it may be ``folder``, or lie in it.
        settings: what the features depend on, in words.

    Attributes:
        summary: holds at any time, also after an exception.

    Raises:
        FolderError: ``out`` has features of other settings.
    """

    def __init__(
        self, folder: Path, pictures: list[Path], out: Path, settings: dict[str, str]
    ) -> None:
        self.out, self.settings = out, settings
        self.summary = Summary(len(pictures))
        targets = {out / f"{path.relative_to(folder)}.safetensors": path for path in pictures}
        finished = self._finished(set(targets))
        self._todo: list[tuple[Path, Path, dict[str, str]]] = []  # picture, target, metadata
        for target, path in targets.items():
            picture = {"photo": path.relative_to(folder).as_posix(), **_stamp(path)}
            before = finished.get(target)
            if before is not None and picture.items() <= before.items():
                self.summary.there += 1
                continue
            self.summary.changed += before is not None
            self._todo.append((path, target, {**settings, **picture}))

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
                continue  # somebody else's
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

    def __len__(self) -> int:
        """Pictures to be done."""
        return len(self._todo)

    def run(
        self,
        network: Network,
        srt: SRT,
        *,
        size: int,
        dtype: torch.dtype,
        workers: int,
        complain: Callable[[str], object],
        progress: Callable[[], object],
    ) -> None:
        """Writes what is not there. A picture that fails is told to ``complain``, and counted.

        Raises:
            FolderError: ``out`` cannot be written, or a worker died.
        """
        start = time.perf_counter()
        pictures = _Pixels([path for path, _, _ in self._todo], size)
        loader = DataLoader(pictures, batch_size=None, num_workers=workers, collate_fn=_as_it_is)
        try:
            for (path, target, metadata), pixels in zip(self._todo, _told(loader), strict=True):
                try:
                    if isinstance(pixels, str):
                        raise PictureError(pixels)
                    tensors = tensors_of(srt(network.image(pixels.numpy())), dtype)
                except PictureError as error:
                    self.summary.failed += 1
                    complain(str(error))
                except (ValueError, RuntimeError, MemoryError) as error:
                    self.summary.failed += 1
                    complain(f"{path}: {error}")
                else:
                    self.summary.bytes += _write(target, tensors, metadata)
                    self.summary.written += 1
                progress()
        finally:
            self.summary.seconds += time.perf_counter() - start


def _stamp(path: Path) -> dict[str, str]:
    """Tells a picture from what it is after a change."""
    try:
        state = path.stat()
    except OSError:  # gone, or a link to nowhere: said when it is opened
        return {"bytes": "", "modified": ""}
    return {"bytes": str(state.st_size), "modified": str(state.st_mtime_ns)}


def _told(loader: DataLoader[Any]) -> Iterator[Any]:
    try:
        yield from loader
    except RuntimeError as error:  # a worker was killed, for its memory perhaps
        raise FolderError(
            f"a worker died ({error}). Too little memory, or /dev/shm? Take fewer --workers"
        ) from error


def save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """A .safetensors file that others may read as any other: its library makes it private."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)


def _write(target: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> int:
    """Under another name first: what has the name of the target is whole. Returns its bytes."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save(tensors, partial, metadata)
        partial.replace(target)
    except (OSError, SafetensorError) as error:  # the disk is full, say: so it is for the others
        raise FolderError(f"{target} cannot be written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)
    return target.stat().st_size
