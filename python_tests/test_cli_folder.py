"""``srt-ext features FOLDER``: what is written, what a second run does, and what goes wrong."""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("typer")

from cli import SMALL, run, small_weights
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load, load_file

from srt_ext import SRT
from srt_ext.cli import common, folder
from srt_ext.cli.images import ImageError, open_image, to_pixels
from srt_ext.srt import SRTOutput

SETTINGS = {"--views": "grid:1", "--stride": 8, "--size": 48, "--workers": 0}


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_weights(tmp_path_factory.mktemp("weights") / "small.safetensors")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two of the same stem, one in a folder, and files that are none of ours."""
    path = tmp_path / "photos"
    (path / "trip/day 2").mkdir(parents=True)
    (path / ".thumbnails").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.jpg", "a.png", "trip/day 2/b.PNG", ".thumbnails/a.png", "._a.jpg"):
        Image.fromarray(rng.integers(0, 255, (40, 64, 3), np.uint8)).save(path / name)
    (path / "notes.txt").write_text("no picture")
    return path


NAMES = ["a.jpg.safetensors", "a.png.safetensors", "trip/day 2/b.PNG.safetensors"]


def made(out: Path) -> dict[str, int]:
    """All files below a folder, with the times at which they were written."""
    return {
        path.relative_to(out).as_posix(): path.stat().st_mtime_ns
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def extract(photos: Path, out: Path, weights: Path, **changed: object) -> tuple[int, str]:
    settings = {"--model": SMALL, "--weights": weights, **SETTINGS}
    settings |= {f"--{name}": value for name, value in changed.items()}
    return run("features", photos, "-o", out, *(x for pair in settings.items() for x in pair))


@pytest.mark.parametrize(("dtype", "workers"), [("float32", 0), ("float16", 0), ("bfloat16", 2)])
def test_each_image_has_a_file(
    photos: Path, weights: Path, tmp_path: Path, dtype: str, workers: int
) -> None:
    out = tmp_path / "new/out"
    code, text = extract(photos, out, weights, dtype=dtype, workers=workers)
    assert code == 0, text
    assert list(made(out)) == NAMES
    assert "3 pictures: 3 written, 0 were there, 0 failed" in text
    network = common.Network(SMALL, weights, None)
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


def test_an_image_alone_and_in_a_folder_has_the_same_features(
    photos: Path, weights: Path, tmp_path: Path
) -> None:
    one = tmp_path / "one.safetensors"
    assert extract(photos, tmp_path / "out", weights, layer=2, dtype="float16")[0] == 0
    assert extract(photos / "a.png", one, weights, layer=2, dtype="float16")[0] == 0
    a, b = load_file(one), load_file(tmp_path / "out/a.png.safetensors")
    assert a["field"].dtype == torch.float16
    assert all(a[name].equal(b[name]) for name in ("field", "prefix"))


def test_a_second_run_writes_what_is_missing(photos: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract(photos, out, weights)
    first = made(out)
    code, text = extract(photos, out, weights)
    assert code == 0
    assert "3 pictures: 0 written, 3 were there, 0 failed" in text
    assert made(out) == first

    (out / NAMES[0]).unlink()
    content = (out / NAMES[1]).read_bytes()
    whole = load(content)["field"]
    (out / NAMES[1]).write_bytes(content[: len(content) // 2])  # of a disk that died
    (out / f".{NAMES[0]}.partial").write_bytes(b"of a run that was killed")
    before = load_file(out / NAMES[2])["field"]
    Image.new("RGB", (40, 64), "red").save(photos / "trip/day 2/b.PNG")
    code, text = extract(photos, out, weights)
    assert code == 0
    assert "3 written (1 had changed since), 0 were there" in text
    assert list(made(out)) == NAMES
    assert load_file(out / NAMES[1])["field"].equal(whole)
    assert load_file(out / NAMES[2])["field"].shape != before.shape


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("views", "grid:2"),
        ("stride", 4),
        ("size", 32),
        ("layer", 1),
        ("dtype", "float16"),
        ("model", "test_vit.r160_in1k"),
    ],
)
def test_other_settings_are_refused(
    photos: Path, weights: Path, tmp_path: Path, name: str, value: object
) -> None:
    out = tmp_path / "out"
    extract(photos, out, weights)
    (out / NAMES[0]).unlink()  # also where there is something to do
    first = made(out)
    code, text = extract(photos, out, weights, **{name: value})
    assert code == 1
    assert "was made with other settings" in text
    assert re.search(rf"\({name} [^;]+, now {value}\)", text)
    assert made(out) == first


def test_other_weights_and_other_folders_are_refused_too(
    photos: Path, weights: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    extract(photos, out, weights)
    first = made(out)
    others = small_weights(tmp_path / "small.safetensors", seed=1)
    code, text = extract(photos, out, others)
    assert code == 1
    assert "(weights " in text
    (tmp_path / "more").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "more/c.png")
    code, text = extract(tmp_path / "more", out, weights, stride=4)
    assert code == 1
    assert "(stride 8, now 4)" in text
    assert made(out) == first
    # The same weights from elsewhere are the same.
    (tmp_path / "moved.safetensors").write_bytes(weights.read_bytes())
    code, text = extract(photos, out, tmp_path / "moved.safetensors", workers=1)
    assert (code, made(out)) == (0, first), text


def test_images_that_fail_are_reported_and_skipped(
    photos: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = SRT.forward

    def out_of_memory_if_tall(self: SRT, images: torch.Tensor, *others: Any) -> Any:
        if images.shape[2] > images.shape[3]:
            raise RuntimeError("out of memory")
        return forward(self, images, *others)

    monkeypatch.setattr(SRT, "forward", out_of_memory_if_tall)
    out = tmp_path / "out"
    whole = (photos / "a.png").read_bytes()
    (photos / "a.png").write_bytes(whole[: len(whole) // 2])
    (photos / "b[red].jpg").write_bytes(b"\xff\xd8\xff no picture")
    (photos / "gone.png").symlink_to("nowhere.png")
    Image.new("RGB", (40, 64)).save(photos / "tall.png")
    code, text = extract(photos, out, weights, workers=1)
    assert code == 1
    assert "6 pictures: 2 written, 0 were there, 4 failed" in text
    assert text.count("error: ") == 4
    for message in (
        "a.png is no readable",
        "b[red].jpg is no readable",
        "gone.png does not exist",
        "tall.png: out of memory",
    ):
        assert message in text
    assert list(made(out)) == [NAMES[0], NAMES[2]]
    (photos / "a.png").write_bytes(whole)
    code, text = extract(photos, out, weights)
    assert code == 1
    assert "1 written, 2 were there, 3 failed" in text


@pytest.mark.parametrize("out", [".", "features", "trip"])
def test_the_output_may_lie_among_the_images(photos: Path, weights: Path, out: str) -> None:
    """Pictures that lie in it are not taken, unless it is the folder itself."""
    (photos / "features").mkdir()
    Image.new("RGB", (40, 40)).save(photos / "features/plot.png")
    code, first = extract(photos, photos / out, weights)
    assert code == 0, first
    count = {".": 4, "features": 3, "trip": 3}[out]
    assert f"{count} pictures: {count} written" in first
    code, second = extract(photos, photos / out, weights)
    assert code == 0, second
    assert f"{count} pictures: 0 written, {count} were there" in second


def test_files_of_others_are_left_alone(photos: Path, weights: Path) -> None:
    other = small_weights(photos / "model.safetensors").read_bytes()
    assert extract(photos, photos, weights)[0] == 0
    assert (photos / "model.safetensors").read_bytes() == other
    small_weights(photos / NAMES[0])  # but under a name of ours it would be taken for ours
    code, text = extract(photos, photos, weights)
    assert code == 1
    assert f"{NAMES[0]} was made with other settings" in text


def test_an_interrupted_run_leaves_whole_files(
    photos: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a file: it is not there, and the next run makes it."""
    out, save, calls = tmp_path / "out", folder.save_file, []

    def interrupted(tensors: Any, path: Path, metadata: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half a file")
            raise KeyboardInterrupt
        save(tensors, path, metadata)

    monkeypatch.setattr(folder, "save_file", interrupted)
    code, text = extract(photos, out, weights)
    assert code == 130
    assert "interrupted; the same command goes on" in text
    assert "1 written" in text
    assert list(made(out)) == NAMES[:1]
    code, text = extract(photos, out, weights)
    assert code == 0
    assert "2 written, 1 were there" in text
    assert list(made(out)) == NAMES


def test_a_full_disk_ends_the_run(
    photos: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_tensors: Any, path: Path, _metadata: Any) -> None:
        path.write_bytes(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(folder, "save_file", full)
    code, text = extract(photos, tmp_path / "out", weights)
    assert code == 1
    assert text.count("error: ") == 1
    assert "cannot be written: No space left on device" in text
    assert "0 written" in text
    assert made(tmp_path / "out") == {}


def test_two_runs_do_not_write_to_one_folder(
    photos: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "LOCK_TIMEOUT", 0.0)
    out = tmp_path / "out"
    out.mkdir()
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    code, text = extract(photos, out, weights)
    os.close(handle)
    assert code == 1
    assert "another run is writing" in text
    assert extract(photos, out, weights)[0] == 0


@pytest.mark.slow
def test_workers_decode_the_images(
    photos: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_path: Path) -> None:
        raise ImageError(f"process {os.getpid()}.")

    monkeypatch.setattr(folder, "open_image", fail)
    for workers in (0, 2):
        text = extract(photos, tmp_path / "out", weights, workers=workers)[1]
        processes = set(re.findall(r"process (\d+)\.", text))
        assert len(processes) == max(1, workers)
        assert (str(os.getpid()) in processes) == (workers == 0)


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run(
    photos: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "open_image", lambda _path: os._exit(1))
    code, text = extract(photos, tmp_path / "out", weights, workers=1)
    assert code == 1
    assert "a worker died" in text
    assert "0 written" in text


@pytest.mark.parametrize(
    ("photos", "out", "message"),
    [
        ("empty", "out", "empty has no pictures"),
        ("full", "out.safetensors", "--output must be a folder"),
        ("full", "file", "--output must be a folder"),
        ("full", "file/out", "cannot be written"),
        ("full/a.png", "out.npz --dtype bfloat16", "bfloat16 does not exist in .npz"),
    ],
)
def test_wrong_arguments_are_refused(
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    photos: str,
    out: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty/inner").mkdir(parents=True)
    Path("full").mkdir()
    Path("file").touch()
    Image.new("RGB", (40, 40)).save("full/a.png")
    before = made(tmp_path)
    options = ("--model", SMALL, "--weights", weights, "--views", "grid:1")
    code, text = run("features", photos, "-o", *out.split(), *options)
    assert code == 1
    assert message in text
    assert text.count("error: ") == 1
    assert made(tmp_path) == before
    assert not Path("out").exists()


def test_values_beyond_float16_are_refused() -> None:
    output = SRTOutput(torch.tensor([1.0, -7e4]).reshape(1, 2, 1, 1), None)
    with pytest.raises(ValueError, match="field goes to 70000"):
        folder.to_tensors(output, torch.float16)
    assert folder.to_tensors(output, torch.bfloat16)["field"].isfinite().all()
