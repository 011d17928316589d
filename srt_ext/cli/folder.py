"""Writes the features of a folder of images: decoding by workers, atomic files, resumable."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typer
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader, Dataset, get_worker_info

from .._messages import describe
from ..extraction import Extraction, to_tensors
from ..hub import by_descriptor
from ..images import Found, ImageError, find_files, open_image, to_pixels, utf8
from . import common
from .common import OutputError


def _decode(path: Path, size: int) -> torch.Tensor | str:
    """[H, W, 3] uint8, or the reason why the file cannot be decoded."""
    try:
        return torch.from_numpy(to_pixels(open_image(path), size))
    except ImageError as error:  # its message names the file
        return str(error)
    except Exception as error:  # usually insufficient memory
        return f"{path}: {describe(error)}"


class _Pixels(Dataset[Any]):
    """Decoded images: [H, W, 3] uint8, or the reason why a file cannot be decoded.

    Workers return images in shared memory, not through a pipe: after the run is killed, a worker
    would block on a full pipe forever. They return None if shared memory is full (/dev/shm in a
    container), because torch's workers would lose the error, and the run would wait forever.
    """

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor | str | None:
        pixels = _decode(self.paths[index], self.size)
        if isinstance(pixels, str) or get_worker_info() is None:
            return pixels
        try:
            pixels.share_memory_()
        except (RuntimeError, OSError):
            return None
        return pixels


def _no_collate(item: Any) -> Any:
    return item


def _load(paths: list[Path], size: int, workers: int) -> Iterator[torch.Tensor | str]:
    """Yields decoded images, or the reason why a file cannot be decoded, as _decode.

    This process decodes the images that a worker cannot return. It decodes all images if /dev/shm
    is full or read-only, or if the limit of open files is low: each image in shared memory is an
    open file, and the run would wait forever for a worker that cannot open it.
    If a worker dies, a new one retries its image alone.
    """
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 64 + 8 * workers or not _has_semaphores():
        workers = 0
    done = 0
    while done < len(paths):
        try:
            for item in _from_workers(paths[done:], size, workers):
                yield _decode(paths[done], size) if item is None else item
                done += 1
        except _WorkerError:
            try:
                (item,) = _from_workers(paths[done : done + 1], size, 1)
                yield _decode(paths[done], size) if item is None else item
            except _WorkerError as error:
                yield (
                    f"{paths[done]}: the decoding process died ({error}), possibly because memory "
                    "or /dev/shm is full: use fewer --workers"
                )
            done += 1


def _has_semaphores() -> bool:
    """Whether a queue to a worker can be created: its semaphores are files in /dev/shm."""
    try:
        torch.multiprocessing.get_context().BoundedSemaphore(1)
    except OSError:
        return False
    return True


def _be_quiet(_worker: int) -> None:
    """Discards messages of libtiff and others on stderr, which would break the printed lines."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


class _WorkerError(RuntimeError):
    """A worker died."""


def _from_workers(paths: list[Path], size: int, workers: int) -> Iterator[Any]:
    settings: Any = {"num_workers": workers, "collate_fn": _no_collate, "worker_init_fn": _be_quiet}
    items = iter(DataLoader(_Pixels(paths, size), batch_size=None, **settings))
    # torch's handler would raise while the features of another image are computed, not here.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except RuntimeError as error:
            raise _WorkerError(str(error)) from None
        yield item


class _Task(NamedTuple):
    path: Path
    target: Path
    metadata: dict[str, str]
    again: bool  # the image has changed since its features were written


def write_folder(
    folder: Path, found: Found, out: Path, extraction: Extraction, workers: int
) -> None:
    """Writes the features of the images in a folder, with a progress bar and a summary.

    ``a/b.jpg`` is written to ``OUT/a/b.jpg.safetensors``, a name that differs from ``b.png``'s. The
    metadata of each file contains the settings. Finished files are skipped. Images that fail are
    reported and skipped.

    ``out`` may be ``folder`` or a folder in it. Existing files are replaced; links are not
    followed.

    Raises:
        OutputError: ``out`` has features of other settings (before any work), or cannot be written.
        typer.Exit: images failed, or the run was interrupted.
    """
    tasks = list_tasks(folder, found, out, extraction.settings)
    common.remove_partials(task.target for task in tasks)
    done = len(found.files) - len(tasks)
    written: list[int | None] = []  # bytes; None for images that failed
    for message in found.errors:
        common.error(message)
    start = time.perf_counter()
    try:
        with common.progress_bar("images", len(found.files)) as progress:
            progress(done)
            for result in _write_all(tasks, extraction, workers):
                written.append(result)
                progress(done + len(written))
    except KeyboardInterrupt:
        common.error("interrupted; run the same command again to resume")
        raise typer.Exit(130) from None
    finally:
        again, skipped = sum(task.again for task in tasks), found.skipped_kinds()
        changed = f" ({again} because the image has changed)" if again else ""
        sizes = [result for result in written if result is not None]
        common.echo(
            f"{len(found.files)} images: {len(sizes)} written{changed}, "
            f"{done} skipped (already done), {written.count(None)} failed",
            *[f"ignored: {skipped}"] * bool(skipped),
            f"{sum(sizes) / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s, "
            f"of which model {extraction.network.backbone.seconds:.1f} s",
            f"wrote features of {extraction.settings['model']} to {out}",
        )
    if None in written or found.errors:
        raise typer.Exit(1)


def list_tasks(folder: Path, found: Found, out: Path, settings: dict[str, str]) -> list[_Task]:
    """The images whose features are not finished."""
    targets = {out / f"{path.relative_to(folder)}.safetensors": path for path in found.files}
    finished = _finished(out, targets, settings)
    tasks = []
    for target, path in targets.items():
        source = {"photo": utf8(path.relative_to(folder).as_posix()), **_file_version(path)}
        if target not in finished or not source.items() <= finished[target].items():
            tasks.append(_Task(path, target, {**settings, **source}, target in finished))
    return tasks


def _write_all(tasks: list[_Task], extraction: Extraction, workers: int) -> Iterator[int | None]:
    """Yields the bytes written for each image, or None if it failed; failures are reported."""
    network, srt, size, dtype, _ = extraction
    loaded = _load([task.path for task in tasks], size, workers)
    for task, pixels in zip(tasks, loaded, strict=True):
        written = None
        try:
            if isinstance(pixels, str):
                raise ImageError(pixels)
            _check_name(task.target)
            tensors = to_tensors(srt(network.image(pixels.numpy())), dtype)
            written = _write(task.target, tensors, task.metadata)
        except Exception as error:  # a failed image does not end the run
            if isinstance(error, OutputError) and error.errno not in _OF_ONE_NAME:
                raise
            named = isinstance(error, (ImageError, OutputError))
            common.error(str(error) if named else f"{task.path}: {describe(error)}")
        yield written


def sizes(paths: list[Path], extraction: Extraction) -> Iterator[int | None]:
    """Extracts each image and yields the bytes of its features; None if it cannot be decoded."""
    for path in paths:
        pixels = _decode(path, extraction.size)
        if isinstance(pixels, str):
            yield None
            continue
        output = extraction.srt(extraction.network.image(pixels.numpy()))
        yield sum(tensor.nbytes for tensor in to_tensors(output, extraction.dtype).values())


def _finished(out: Path, targets: Any, settings: dict[str, str]) -> dict[Path, dict[str, str]]:
    """The metadata of the files in ``out``. Raises an OutputError if one has other settings."""
    metadata_of = {}
    for path in sorted({*targets, *find_files(out, (".safetensors",)).files}):
        try:
            metadata = _metadata(path)
        except (OSError, SafetensorError):
            continue  # absent or damaged: written again if it is a target
        if path not in targets and "srt_ext" not in metadata:
            continue  # not written by srt_ext
        if others := common.other_settings(metadata, settings):
            raise OutputError(
                f"{path} was written with other settings ({others}): choose another --output, or "
                f"remove the features in {out}"
            )
        metadata_of[path] = metadata
    return metadata_of


def _metadata(path: Path) -> dict[str, str]:
    """The metadata of a .safetensors file. Raises an error if the file is incomplete."""
    if not path.is_file():  # reading a pipe may never end
        raise FileNotFoundError(path)
    with path.open("rb") as file, safe_open(by_descriptor(file), "pt") as tensors:
        return dict(tensors.metadata() or {})


def _file_version(path: Path) -> dict[str, str]:
    """Size and modification time, to detect that an image has changed."""
    try:
        state = path.stat()
    except OSError:  # absent or a broken link: reported when it is opened
        return {"bytes": "", "modified": ""}
    return {"bytes": str(state.st_size), "modified": str(state.st_mtime_ns)}


def save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes dense tensors to a .safetensors file. Raises an OSError if this fails.

    safetensors.torch.save_file writes metadata in random order, so that files of the same features
    would differ.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        about = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**about, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.flatten().view(torch.uint8).numpy().data)


_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

# Errors that only concern one name. Others, such as a full disk, would occur for every file.
_OF_ONE_NAME = {
    *(errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL, errno.ELOOP),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOENT),
    *(errno.EACCES, errno.EPERM),
}


def _check_name(target: Path) -> None:
    """Raises an OutputError if the name of the target is invalid, before the model runs."""
    try:
        target.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise OutputError.of(target, error) from None


def _write(target: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> int:
    """Writes tensors to ``target``. Returns the number of bytes."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError.of(target, error) from None
    with common.replacing(target) as partial:
        save(tensors, partial, metadata)
    return target.stat().st_size
