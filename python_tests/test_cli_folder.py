"""``srt-ext features FOLDER``: output, second runs, and errors."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import socket
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli import SMALL, run, small_weights
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load, load_file
from torch.utils.data import dataloader

from srt_ext import SRT
from srt_ext.cli import common, folder
from srt_ext.extraction import Network, to_tensors
from srt_ext.images import ImageError, find_images, open_image, to_pixels
from srt_ext.srt import SRTOutput


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two images of one stem, one in a subfolder, and files that are not to be read."""
    path = tmp_path / "photos"
    (path / "trip/day 2").mkdir(parents=True)
    (path / ".thumbnails").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.jpg", "a.png", "trip/day 2/b.PNG", ".thumbnails/a.png", "._a.jpg"):
        Image.fromarray(rng.integers(0, 255, (40, 64, 3), np.uint8)).save(path / name)
    (path / "notes.txt").write_text("no picture")
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "new/out"


NAMES = ["a.jpg.safetensors", "a.png.safetensors", "trip/day 2/b.PNG.safetensors"]


def made(out: Path) -> dict[str, int]:
    """All files below a folder, with their modification times."""
    return {
        path.relative_to(out).as_posix(): path.stat().st_mtime_ns
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def extract(photos: Path, out: Path, code: int = 0, **changed: object) -> str:
    settings = {"model": SMALL, "weights": small_weights(), "views": "grid:1"}
    settings |= {"stride": 8, "size": 48, "workers": 0} | changed
    options = [f"--{name}={value}" for name, value in settings.items()]
    return run("features", photos, "-o", out, *options, code=code)


@pytest.mark.parametrize(
    ("dtype", "workers", "suffix"),
    [("float32", 0, ".npz"), ("float16", 0, ".npz"), ("bfloat16", 2, ".safetensors")],
)
def test_each_image_has_a_file(
    photos: Path, out: Path, dtype: str, workers: int, suffix: str
) -> None:
    """With the same features as a run for the single image."""
    text = extract(photos, out, dtype=dtype, workers=workers, layer=2)
    assert list(made(out)) == NAMES
    assert "3 images: 3 written, 0 skipped (already done), 0 failed" in text
    assert "ignored: 2 hidden, 1 .txt" in text
    network = Network.load(SMALL, small_weights(), 2)
    srt = SRT(network.backbone, "grid:1", stride=8)
    for name in NAMES:
        tensors = load_file(out / name)
        photo = photos / name.removesuffix(".safetensors")
        pixels = to_pixels(open_image(photo), 48)
        assert pixels.shape == (30, 48, 3)
        expected = srt(network.image(pixels))
        assert tensors["field"].shape == (64, 4, 6)
        kind = getattr(torch, dtype)
        torch.testing.assert_close(tensors["field"], expected.field[0].to(kind))
        torch.testing.assert_close(tensors["prefix"], expected.prefix[0].to(kind))
        with safe_open(out / name, "pt") as file:
            metadata = file.metadata()
        assert metadata["photo"] == name.removesuffix(".safetensors")
        assert (metadata["views"], metadata["dtype"]) == ("grid:1", dtype)
    extract(photo, out / f"alone{suffix}", dtype=dtype, layer=2)
    if suffix == ".npz":
        alone = {key: torch.from_numpy(v) for key, v in np.load(out / "alone.npz").items()}
    else:
        alone = load_file(out / "alone.safetensors")
        with safe_open(out / "alone.safetensors", "pt") as file:
            assert file.metadata()["views"] == "grid:1"
    assert all(alone[key].equal(tensors[key]) for key in ("field", "prefix"))


def test_the_model_in_bfloat16_gives_other_features_of_its_own(
    photos: Path, out: Path, tmp_path: Path
) -> None:
    extract(photos, out)
    extract(photos, tmp_path / "half", **{"model-dtype": "bfloat16"})
    for name in NAMES:
        half, full = (load_file(place / name)["field"] for place in (tmp_path / "half", out))
        assert half.dtype == torch.float32
        error = (half - full).norm() / full.norm()
        assert 1e-4 < error < 3e-2
    assert "was written with other settings (model" in extract(photos, tmp_path / "half", code=1)


def test_another_run_writes_the_same_bytes(photos: Path, out: Path, tmp_path: Path) -> None:
    for place in (out, tmp_path / "again"):
        extract(photos, place, workers=2 * (place == out))
    assert list(made(tmp_path / "again")) == NAMES
    for name in NAMES:
        content = (out / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == content
        (size,) = struct.unpack_from("<Q", content)
        assert size % 8 == 0
        assert list(json.loads(content[8 : 8 + size])["__metadata__"])[-3:] == [
            "photo",
            "bytes",
            "modified",
        ]


def test_a_second_run_writes_missing_files(photos: Path, out: Path) -> None:
    extract(photos, out)
    first = made(out)
    assert "3 images: 0 written, 3 skipped (already done), 0 failed" in extract(photos, out)
    assert made(out) == first

    (out / NAMES[0]).unlink()
    content = (out / NAMES[1]).read_bytes()
    (out / NAMES[1]).write_bytes(content[: len(content) // 2])  # as after a failure of the disk
    with suppress(ZeroDivisionError), common.replacing(out / NAMES[0]) as partial:
        raise ZeroDivisionError
    partial.write_bytes(b"of a run that was killed")
    others = partial.with_name(f".{'0' * 16}-{'0' * 16}.partial")
    others.write_bytes(b"of a run that writes to another file")
    before = load_file(out / NAMES[2])["field"]
    Image.new("RGB", (40, 64), "red").save(photos / "trip/day 2/b.PNG")
    assert "3 written (1 because the image has changed), 0 skipped (already done)" in extract(
        photos, out
    )
    assert list(made(out)) == [others.name, *NAMES]
    assert load_file(out / NAMES[1])["field"].equal(load(content)["field"])
    assert load_file(out / NAMES[2])["field"].shape != before.shape


def test_other_settings_are_errors(photos: Path, out: Path, tmp_path: Path) -> None:
    extract(photos, out)
    (out / NAMES[0]).unlink()  # also if images are left to compute
    first = made(out)
    others = {"views": "grid:2", "stride": 4, "size": 32, "layer": 1, "dtype": "float16"}
    for name, value in {**others, "model": "test_vit.r160_in1k"}.items():
        text = extract(photos, out, 1, **{name: value})
        assert "was written with other settings" in text
        assert re.search(rf"\({name} [^;]+, now {value}\)", text)
    assert "(weights " in extract(photos, out, 1, weights=small_weights(seed=1))
    (tmp_path / "more").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "more/c.png")
    assert "(stride 8, now 4)" in extract(tmp_path / "more", out, 1, stride=4)
    assert made(out) == first
    # The same weights at another path are the same setting.
    moved = shutil.copy(small_weights(), tmp_path / "moved.safetensors")
    assert "1 written, 2 skipped (already done)" in extract(photos, out, weights=moved, workers=1)


def test_images_that_fail_are_reported_and_skipped(
    photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = SRT.forward

    def out_of_memory_if_tall(self: SRT, images: torch.Tensor, *others: Any) -> Any:
        if images.shape[2] > images.shape[3]:
            raise RuntimeError("out of memory")
        return forward(self, images, *others)

    monkeypatch.setattr(SRT, "forward", out_of_memory_if_tall)
    whole = (photos / "a.png").read_bytes()
    (photos / "a.png").write_bytes(whole[: len(whole) // 2])
    (photos / "b[red].jpg").write_bytes(b"\xff\xd8\xff no picture")
    (photos / "gone.png").symlink_to("nowhere.png")
    Image.new("RGB", (40, 64)).save(photos / "tall.png")
    text = extract(photos, out, 1, workers=1)
    assert "6 images: 2 written, 0 skipped (already done), 4 failed" in text
    assert text.count("error: ") == 4
    for message in (
        "a.png is not a readable",
        "b[red].jpg is not a readable",
        "gone.png does not exist",
        "tall.png: not enough memory (out of memory): use a smaller size",
    ):
        assert message in text
    assert list(made(out)) == [NAMES[0], NAMES[2]]
    (photos / "a.png").write_bytes(whole)
    assert "1 written, 2 skipped (already done), 3 failed" in extract(photos, out, 1)


@pytest.mark.parametrize(("out", "count"), [(".", 4), ("features", 3), ("trip", 3)])
def test_the_output_may_be_inside_the_folder_of_images(photos: Path, out: str, count: int) -> None:
    """Images in the output folder are skipped, unless it is the folder of the images."""
    (photos / "features").mkdir()
    Image.new("RGB", (40, 40)).save(photos / "features/plot.png")
    assert f"{count} images: {count} written" in extract(photos, photos / out)
    assert f"{count} images: 0 written, {count} skipped (already done)" in extract(
        photos, photos / out
    )


def test_unrelated_files_are_kept(photos: Path) -> None:
    other = shutil.copy(small_weights(), photos / "model.safetensors")
    extract(photos, photos)
    assert other.read_bytes() == small_weights().read_bytes()
    shutil.copy(other, photos / NAMES[0])  # but under a name of ours it would be taken for ours
    assert f"{NAMES[0]} was written with other settings" in extract(photos, photos, 1)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to resume"),
        (OSError("No space left on device"), 1, "cannot be written: No space left on device"),
    ],
)
def test_an_interrupted_run_leaves_complete_files(
    photos: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    """The file that was being written does not exist; the next run writes it."""
    save, calls = folder.save, []

    def fail_once(tensors: Any, path: Path, metadata: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half a file")
            raise error
        save(tensors, path, metadata)

    monkeypatch.setattr(folder, "save", fail_once)
    text = extract(photos, out, code)
    assert text.count("error: ") == 1
    assert message in text
    assert "1 written" in text
    assert list(made(out)) == NAMES[:1]
    assert "2 written, 1 skipped (already done)" in extract(photos, out)
    assert list(made(out)) == NAMES


def test_two_runs_do_not_write_to_one_folder(
    photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "LOCK_TIMEOUT", 0.0)
    with common.lock_folder(out):
        assert "another run is writing" in extract(photos, out, 1)
    extract(photos, out)


@pytest.mark.slow
def test_workers_decode_the_images(
    photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_path: Path) -> None:
        raise ImageError(f"process {os.getpid()}.")

    monkeypatch.setattr(folder, "open_image", fail)
    for workers in (0, 2):
        processes = set(re.findall(r"process (\d+)\.", extract(photos, out, 1, workers=workers)))
        assert len(processes) == max(1, workers)
        assert (str(os.getpid()) in processes) == (workers == 0)
    # Workers would hang where few files can be open.
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (40, 40))
    assert f"process {os.getpid()}." in extract(photos, out, 1, workers=2)


@pytest.mark.parametrize("always", [True, False])
def test_a_worker_that_dies_loses_at_most_its_image(
    photos: Path, out: Path, always: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die_of_one(path: Path) -> Any:
        if path.name == "a.png" and (always or not (photos / "tried").exists()):
            (photos / "tried").touch()
            os._exit(1)
        return open_image(path)

    wait = dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(wait, "__defaults__", (0.3,))  # seconds, until a death is seen
    monkeypatch.setattr(folder, "open_image", die_of_one)
    text = extract(photos, out, int(always), workers=1)
    if always:
        assert "a.png: the decoding process died" in text
        assert text.count("error: ") == 1
    assert list(made(out)) == [name for name in NAMES if not always or "a.png" not in name]


def test_images_are_decoded_in_this_process_without_shared_memory(
    photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    extract(photos, out, workers=1)
    assert list(made(out)) == NAMES


def test_images_are_decoded_in_this_process_without_semaphores(
    photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("_multiprocessing.SemLock", fail)  # /dev/shm is full or read-only
    extract(photos, out, workers=1)
    assert list(made(out)) == NAMES


@pytest.mark.slow
def test_a_run_without_stdin_stdout_and_stderr(photos: Path, out: Path) -> None:
    options = f"--model {SMALL} --weights {small_weights()} --views grid:1 --stride 8 --size 48"
    command = f'exec "{sys.executable}" -m srt_ext features "{photos}" -o "{out}" {options}'
    done = subprocess.run(
        ["bash", "-c", f"{command} <&- >&- 2>&-"], timeout=120, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0
    assert list(made(out)) == NAMES


# ---- names and kinds ----------------------------------------------------------------------------


def copies(photos: Path, *names: bytes | str) -> None:
    """Copies one image to other names."""
    for name in names:
        shutil.copy(photos / "a.png", photos / os.fsdecode(name))


def test_an_image_may_have_any_name(photos: Path, out: Path) -> None:
    names = ["-a.png", "new\nline.png", "[red]%s{0}.png", "a.png.safetensors.png", "图\u202e.png"]
    long = "m" + "照" * 78 + ".png"  # 239 bytes
    copies(photos, b"caf\xe9.png", *names, long)
    (photos / os.fsdecode(b"sub\xff")).mkdir()
    copies(photos, b"sub\xff/\xfe.png")
    text = extract(photos, out)
    assert "11 images: 11 written" in text
    assert {*names, long} <= {name.removesuffix(".safetensors") for name in made(out)}
    assert "11 images: 0 written, 11 skipped (already done)" in extract(photos, out)
    metadata = folder._metadata(out / os.fsdecode(b"sub\xff/\xfe.png.safetensors"))
    assert metadata["photo"] == r"sub\xff/\xfe.png"


def test_an_impossible_output_path_is_reported_and_skipped(
    photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model runs for the image, if its name is the reason."""
    too_long = "m" * 240 + ".png"
    copies(photos, too_long)
    (out / NAMES[1]).mkdir(parents=True)
    (out / "trip").touch()
    text = extract(photos, out, 1)
    assert "4 images: 1 written, 0 skipped (already done), 3 failed" in text
    for name, reason in (
        (f"{too_long}.safetensors", "File name too long"),
        (NAMES[1], "Is a directory"),
        (NAMES[2], "Not a directory"),
    ):
        assert f"{out / name} cannot be written: {reason}" in text
    assert list(made(out)) == [NAMES[0], "trip"]


def test_suffixes_that_pillow_reads_are_included(photos: Path, out: Path) -> None:
    names = ["a.jfif", "b.JPE", "c.Tif", "d.jp2", "e.bmp", "f.ppm", "g.tga", "h.webp", "i.jpeg"]
    copies(photos, *names, "a.pdf", "b.eps", "c.h5", "d.pfm", "e.mpg", "none", "f.jpg~")
    text = extract(photos, out)
    assert set(made(out)) == {f"{name}.safetensors" for name in names} | set(NAMES)
    assert "ignored: 2 hidden, 1 .pdf, 1 .eps, 1 .h5, 1 .pfm, 4 others" in text


def test_linked_folders_are_read_once(photos: Path, out: Path, tmp_path: Path) -> None:
    shutil.copytree(photos / "trip", tmp_path / "elsewhere")
    (photos / "first").symlink_to("trip")  # whose images are read under its own name
    (photos / "linked").symlink_to(tmp_path / "elsewhere")
    (photos / "linked too").symlink_to(tmp_path / "elsewhere")
    (photos / "trip/loop").symlink_to("..")
    (photos / "itself").symlink_to("itself")
    text = extract(photos, out)
    assert set(made(out)) == {*NAMES, "linked/day 2/b.PNG.safetensors"}
    assert "ignored: 3 linked twice, 2 hidden, 1 without a suffix, 1 .txt" in text
    assert "4 images: 0 written, 4 skipped (already done)" in extract(photos, out)


def test_pipes_and_sockets_are_not_opened(photos: Path, out: Path) -> None:
    os.mkfifo(photos / "pipe.png")
    out.mkdir(parents=True)
    os.mkfifo(out / "c.safetensors")
    (photos / "zero.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(os.path.relpath(photos / "socket.png"))
        text = extract(photos, out, 1, workers=1)
    assert "6 images: 3 written, 0 skipped (already done), 3 failed" in text
    for name in ("pipe.png", "socket.png", "zero.png"):
        assert f"{photos / name} is not a regular file" in text


def test_a_folder_that_cannot_be_read_is_reported(
    photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listdir = os.listdir

    def refuse(path: Path) -> list[str]:
        if path.name == "trip":
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    text = extract(photos, out, 1)
    assert f"{photos}/trip cannot be read: Permission denied" in text
    assert "2 images: 2 written, 0 skipped (already done), 0 failed" in text


@pytest.mark.slow
def test_a_deep_tree_is_read(tmp_path: Path) -> None:
    """Deeper than the recursion limit of Python."""
    place = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("a", dir_fd=place)
        inner = os.open("a", os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = inner
    os.close(os.open("b.png", os.O_CREAT, dir_fd=place))
    os.close(place)
    found = find_images(tmp_path, nested=True)
    assert [path.name for path in found.files] == ["b.png"]
    assert not found.errors
    for depth in (1000, 500, 0):  # shutil.rmtree of pytest is recursive
        shutil.rmtree(tmp_path.joinpath(*["a"] * (depth + 1)))


def test_an_output_file_that_is_a_link_is_replaced(photos: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"of others")
    out.mkdir(parents=True)
    (out / NAMES[0]).symlink_to(tmp_path / "precious")
    extract(photos, out)
    assert (tmp_path / "precious").read_bytes() == b"of others"
    assert not (out / NAMES[0]).is_symlink()


def test_any_exception_of_an_image_is_reported(
    photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = iter([ZeroDivisionError("a"), RecursionError("b"), IndexError("c")])

    def fail(*_: Any) -> None:
        raise next(errors)

    monkeypatch.setattr(SRT, "forward", fail)
    text = extract(photos, out, 1)
    for line in ("a.jpg: ZeroDivisionError: a", "a.png: RecursionError: b", "b.PNG: IndexError: c"):
        assert line in text


def test_a_disk_that_gets_full_ends_the_run(photos: Path, out: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        text = extract(photos, out, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert text.count("error: ") == 1
    assert f"{out / NAMES[0]} cannot be written: File too large" in text
    assert "3 images: 0 written" in text
    assert made(out) == {}


def test_values_beyond_float16_raise() -> None:
    output = SRTOutput(torch.tensor([1.0, -7e4]).reshape(1, 2, 1, 1), None)
    with pytest.raises(ValueError, match=r"field must be at most 65504 .*; got 70000: use dtype"):
        to_tensors(output, torch.float16)
    assert to_tensors(output, torch.bfloat16)["field"].isfinite().all()
    infinite = SRTOutput(torch.tensor([1.0, -torch.inf]).reshape(1, 2, 1, 1), None)
    assert to_tensors(infinite, torch.float16)["field"].isinf().any()
