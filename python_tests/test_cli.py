"""The command ``srt-ext``: figures, features, weights, the default model, and errors."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli import SMALL, crops, run, small_weights, timm
from PIL import Image
from PIL import __version__ as pillow_version
from process import run_python
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from srt_ext import SRT, hub, views, viz
from srt_ext.__main__ import main
from srt_ext.cli import common
from srt_ext.demo.small import load_small
from srt_ext.images import open_image
from srt_ext.viz import Panel

ROOT = Path(__file__).parents[1]
FAST = ("--views", "grid:1", "--stride", 4, "--size", 64)


def model() -> tuple[object, ...]:
    """Options for a small model with random weights."""
    return ("--model", SMALL, "--weights", small_weights())


def show(photo: Path, output: Path, *options: object) -> str:
    return run("show", photo, "-o", output, *model(), *FAST, *options)


def features(photo: Path, output: Path, *options: object) -> tuple[str, dict[str, torch.Tensor]]:
    """Runs ``srt-ext features``; returns its output and the tensors that it wrote."""
    text = run("features", photo, "-o", output, *options)
    if output.suffix == ".npz":
        return text, {k: torch.from_numpy(v) for k, v in np.load(output).items()}
    return text, load_file(output)


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(crops(1)[0]).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[list[Panel]]]:
    """A list that records the rows of every drawn figure."""
    kept, draw = [], viz.draw

    def keep(rows: Any, names: Any) -> Any:
        kept.append(rows)
        return draw(rows, names)

    monkeypatch.setattr(viz, "draw", keep)
    return kept


def normalised(path: Path, mean: Any, std: Any) -> torch.Tensor:
    """[1, 3, H, W] of an image at most 64 pixels long."""
    image = Image.open(path)
    image.thumbnail((64, 64), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (mean, std))
    return ((pixels - mean) / std)[None]


# ---- show ---------------------------------------------------------------------------------------


def test_show_writes_a_figure_with_a_row_for_each_layer(
    photo: Path, tmp_path: Path, drawn: Any
) -> None:
    output, sizes = tmp_path / "out.png", []
    for layers in ([], ["--layer", 0, "--layer", -1]):
        text = show(photo, output, *layers)
        for part in ("image 64 x 48 pixels", "scale 1, 9 views", "model", "SRT", f"wrote {output}"):
            assert part in text
        figure = np.asarray(Image.open(output).convert("RGB"))
        assert figure.std() > 20
        sizes.append(figure.shape)
    assert sizes[0][1] > 5 * sizes[0][0] * 0.9  # five panels side by side
    assert sizes[1][0] == pytest.approx(2 * sizes[0][0], abs=2)
    (last,), (zeroth, also_last) = drawn
    for a, b in zip(last, also_last, strict=True):
        assert (a.rgb == b.rgb).all()
    assert (zeroth[1].rgb != last[1].rgb).any()


def test_noise_is_grey_and_query_in_pixels_of_the_original(tmp_path: Path, drawn: Any) -> None:
    """The model sees a smaller image."""
    pixels = np.zeros((320, 480, 3), np.uint8)
    pixels[:] = np.random.default_rng(0).integers(0, 60, pixels.shape)
    pixels[240:320, 360:480] += 180
    photo, output = tmp_path / "photo.png", tmp_path / "out.png"
    Image.fromarray(pixels).save(photo)
    text = show(photo, output, "--noise", "--query", "420,300", "--size", 96, "--layer", 0)
    assert "image 96 x 64 pixels (width x height) reduced by --size from 480 x 320" in text
    ((row,),) = drawn
    assert row[0].point == pytest.approx((84.1, 60.1))
    noise, plain, srt = row[5:]
    assert noise.rgb.std() > 0.1
    np.testing.assert_allclose(noise.rgb, noise.rgb[:, :, :1].repeat(3, 2), atol=1e-6)
    for panel, cell in ((plain, (slice(48, 64), slice(80, 96))), (srt, (slice(60, 64), 84))):
        assert panel.rgb.shape == (64, 96, 3)
        light = panel.rgb.sum(2)
        assert (light[cell] == light.max()).all()  # the similarity to itself is 1
        inside, outside = light[52:, 76:], light[:40, :64]
        assert inside.min() > outside.max()


# ---- show, of a video ---------------------------------------------------------------------------


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """The first and the last are equal; numbers and names are in different orders."""
    path = tmp_path / "frames"
    path.mkdir()
    a, b, c = crops(3)
    for name, pixels in {"f1": a, "f2": b, "f10": c, "f11": a}.items():
        Image.fromarray(pixels).save(path / f"{name}.png")
    return path


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_a_video_is_an_animation_in_one_basis(
    frames: Path, tmp_path: Path, suffix: str, drawn: Any
) -> None:
    output = tmp_path / f"out{suffix}"
    assert "4 frames: 4 written, 0 skipped" in show(frames, output, "--fps", 5, "--query", "5,5")
    with Image.open(output) as video:
        assert video.n_frames == 4
        video.seek(1)
        assert np.asarray(video.convert("RGB")).std() > 20
        assert video.info["duration"] == 200
    for (row,), pixels in zip(drawn, (*crops(3), crops(1)[0]), strict=True):
        np.testing.assert_array_equal(np.rint(row[0].rgb * 255), pixels)
    assert (drawn[0][0][3].rgb == drawn[3][0][3].rgb).all()


def test_unusable_frames_of_a_video_are_skipped(frames: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    show(frames, output)
    names = [f"0000{i}.png" for i in range(4)]
    assert sorted(path.name for path in output.iterdir()) == names
    first, *middle, last = (np.asarray(Image.open(output / name)) for name in names)
    assert (first == last).all()
    assert all((first != other).any() for other in middle)
    (frames / "f2.png").write_bytes((frames / "f2.png").read_bytes()[:500])
    Image.new("RGB", (40, 40)).save(frames / "f3.png")
    text = run("show", frames, "-o", tmp_path / "other", *model(), *FAST, code=1)
    assert "f2.png is not a readable image" in text
    assert "f3.png is 40 x 40; skipped" in text
    assert "5 frames: 3 written, 2 skipped" in text
    assert len(list((tmp_path / "other").iterdir())) == 3


def test_the_first_frame_that_succeeds_gives_the_basis(
    frames: Path, tmp_path: Path, drawn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frame may be unreadable or fail in the model."""
    field, calls = viz.Comparison.field, []

    def fail_once(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            raise RuntimeError("no field")
        return field(*arguments)

    monkeypatch.setattr(viz.Comparison, "field", fail_once)
    (frames / "f0.png").write_text("no picture")
    text = run("show", frames, "-o", tmp_path / "out.gif", *model(), *FAST, "--query=9,9", code=1)
    assert "5 frames: 3 written, 2 skipped" in text
    assert "f0.png is not a readable image" in text
    assert "f1.png: RuntimeError: no field; skipped" in text
    again = shutil.ignore_patterns("f0.png", "f1.png")
    shutil.copytree(frames, tmp_path / "again", ignore=again)
    show(tmp_path / "again", tmp_path / "out.gif", "--query=9,9")
    for (row,), (again,) in zip(drawn[:3], drawn[3:], strict=True):
        for panel, other in zip(row, again, strict=True):
            assert (panel.rgb == other.rgb).all()


# ---- features of an image -----------------------------------------------------------------------


def test_16_bit_images_are_scaled_and_transparent_pixels_are_white(tmp_path: Path) -> None:
    shades = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(shades).save(tmp_path / "deep.png")
    deep = np.asarray(open_image(tmp_path / "deep.png"))
    assert (deep == (shades // 257)[:, :, None]).all()
    Image.new("RGBA", (4, 4), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (np.asarray(open_image(tmp_path / "clear.png")) == 255).all()


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("show missing.jpg", "missing.jpg does not exist"),
        ("show no[/b]picture[red].png", "no[/b]picture[red].png does not exist"),
        ("show broken.jpg", "not a readable image"),
        ("show large.png", "not a readable image"),
        ("show dot.png SMALL", "at least 3 tokens for PCA colours; got 1"),
        ("features empty.png -o out.npz", "not a readable image"),
        ("features pipe.png -o out.npz", "pipe.png is not a regular file"),
        ("features /dev/zero -o out.npz", "/dev/zero is not a regular file"),
        ("features program.jpg -o out.npz", "not a readable image: cannot identify"),  # EPS
        (f"features {'a' * 300}.png -o out.npz", "File name too long"),
        (f"features photo.png -o {'a' * 300}.npz", "File name too long"),
        ("features photo.png -o pipe.npz", "it is not a regular file"),
        ("show photo.png --weights pipe.png", "existing .safetensors file; got pipe.png"),
        ("show float.tif SMALL", "not a readable image: pixels must have 8 or 16 bits"),
        ("show photo.png --model vit_smal_patch16_224", "Similar names: vit_small_patch16_224,"),
        ("show photo.png --model dinov2", "Similar names: vit_base_patch14_dinov2,"),
        ("show photo.png --model facebook/dinov2-small", "on the hub is hf-hub:OWNER/NAME"),
        ("show photo.png --model=", "timm has no model ''. timm.list_models() lists all names"),
        ("show photo.png --model foo:bar", "timm has no model 'foo:bar'"),
        ("show photo.png --model local-dir:/nothere", "the model folder /nothere does not exist"),
        (
            "show photo.png --model local-dir:frames",
            "frames has no config.json with the architecture",
        ),
        ("show photo.png --model hf-hub:", "--model must be hf-hub:OWNER/NAME; got 'hf-hub:'"),
        (
            "show photo.png --model hf-hub:a/b/c",
            "--model must be hf-hub:OWNER/NAME; got 'hf-hub:a/",
        ),
        (
            "show photo.png --weights missing.safetensors",
            "existing .safetensors file; got missing",
        ),
        ("show photo.png --weights frames", "got the folder frames. Pass the file in it, or"),
        ("show photo.png SMALL --weights broken.jpg", "file: Error while"),
        ("show photo.png SMALL --weights broken.jpg", ". Pickles (.pt, .pth, .bin) can execute"),
        ("show photo.png SMALL --model test_vit.x", "timm cannot create"),
        ("show photo.png SMALL --model test_resnet", "do not fit test_resnet: "),
        (
            "show photo.png SMALL --model test_resnet",
            "more). Select the timm model of these weights",
        ),
        ("show photo.png SMALL --model vit_tiny_patch16_224", " must be [1, 1, 192], got"),
        ("show photo.png --views ring", "views must be"),
        ("show photo.png SMALL --quality fast --views 3", "quality must be omitted if views or"),
        ("show photo.png SMALL --layer 6", "layers must be in -6 ... 5; got 6"),
        ("show photo.png -o out.xyz", "must end in"),
        ("show photo.png -o out.gif", "must end in .png, .jpg, .jpeg"),
        ("show photo.png -o nowhere/out.png", "does not exist"),
        ("show photo.png -o folder.png", "folder.png cannot be written"),
        *(
            (f"show photo.png --query={query}", "--query must")
            for query in ("64,0", "0,48", "-1,3", "1.5,3", "3", "1,2,3", "a,b")
        ),
        ("show frames -o out.png", "--output must end in .gif or .webp"),
        ("show photo.png -o photo.png", "--output must not be an input image"),
        ("show frames -o linked.gif", "--output must not be an input image"),
        ("show photo.png -o loop.png", "loop.png cannot be written: its symbolic links"),
        ("features frames SMALL -o loop.png", "loop.png cannot be written: "),
        ("show frames -o nowhere/out.gif", "does not exist"),
        ("show frames -o frames", "must be a new or empty folder"),
        ("show frames --query 64,0", "--query must be in the image"),
        ("show broken -o out.gif", "none of 2 frames is a readable image"),
        ("show broken -o new", "none of 2 frames is a readable image"),
        ("show dots SMALL -o out.gif", "none of 1 frames could be drawn"),
        ("show folder.png -o out.gif", "folder.png has no images; ignored: 1 folders"),
        ("features folder.png -o out", "folder.png has no images"),
        ("features frames -o out.safetensors", "--output must be a folder"),
        ("features frames -o photo.png", "--output must be a folder"),
        ("features frames SMALL -o photo.png/out", "cannot be written"),
        ("features photo.png -o out.npz --dtype bfloat16", "bfloat16 is not supported in .npz"),
    ],
)
@pytest.mark.usefixtures("photo", "frames")
def test_an_error_is_one_line_and_nothing_is_written(
    command: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    for folder in ("folder.png/inner", "broken", "dots"):
        Path(folder).mkdir(parents=True)
    for pipe in ("pipe.png", "pipe.npz"):
        os.mkfifo(pipe)
    Path("linked.gif").symlink_to("frames/f1.png")
    Path("loop.png").symlink_to("loop.png")
    for empty in ("empty.png", "broken/1.png", "broken/2.png"):
        Path(empty).touch()
    for dot in ("dot.png", "dots/dot.png"):
        Image.new("RGB", (3, 3)).save(dot)
    Image.new("RGB", (3, 3)).save("program.jpg", "EPS")
    Image.new("F", (20, 20)).save("float.tif")
    Image.new("RGB", (100, 100)).save("large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    before = sorted(tmp_path.rglob("*"))
    text = run(*command.replace("SMALL", " ".join(map(str, model()))).split(), code=1)
    assert text.count("error: ") == 1 + command.startswith("show dots")
    assert message in text
    assert "Traceback" not in text
    assert sorted(tmp_path.rglob("*")) == before


# ---- out of memory, full disk -------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 2 bytes\nin C++"),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ],
)
@pytest.mark.parametrize("command", ["features", "show"])
def test_out_of_memory_is_a_one_line_error_with_advice(
    command: str, error: Exception, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(SRT, "_frame", fail)
    output = tmp_path / ("out.png" if command == "show" else "out.npz")
    text = run(command, photo, "-o", output, "--model", "small", *FAST, code=1)
    (line,) = (line for line in text.splitlines() if line.startswith("error"))
    assert "not enough memory" in line
    assert "use a smaller size or scale, a larger stride, smaller batches" in line


def test_unexpected_errors_keep_their_traceback(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(SRT, "_frame", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        run("features", photo, "-o", tmp_path / "out.npz", "--model", "small", *FAST)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing more bytes to a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("command", "output"),
    [
        *(("features photo.png", name) for name in ("out.npz", "out.safetensors", "out.NPZ")),
        *(("show photo.png", name) for name in ("out.png", "out.JPG", "out.svg", "out.pdf")),
        *(("show frames", name) for name in ("out.gif", "out.webp", "new")),
        pytest.param("demo --scenes 1", "out.png", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("photo", "frames")
def test_a_full_disk_is_a_one_line_error_and_keeps_the_earlier_file(
    command: str, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = () if command.startswith("demo") else (*model(), *FAST)
    if "." in output:
        Path(output).write_bytes(b"earlier")
    with file_size_limit(1000):
        text = run(*command.split(), "-o", output, *settings, code=1)
    assert text.count("error: ") == 1
    assert f"{output}{'' if '.' in output else '/00000.png'} cannot be written: " in text
    new = {path.name for path in tmp_path.rglob("*")} - {"photo.png", "frames"}
    assert new - {f"f{i}.png" for i in (1, 2, 10, 11)} == {output}
    if "." in output:
        assert Path(output).read_bytes() == b"earlier"


def test_concurrent_runs_leave_a_complete_file(tmp_path: Path) -> None:
    path = tmp_path / ("照" * 78 + ".safetensors")  # too long for a suffix
    with common.replacing(path) as first, first.open("wb") as one:
        one.write(b"a" * 10)
        with common.replacing(path) as second, second.open("wb") as two:
            one.write(b"a" * 10)
            one.flush()
            two.write(b"b" * 15)
        assert path.read_bytes() == b"b" * 15
        one.write(b"a" * 10)
    assert path.read_bytes() == b"a" * 30
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("plant", ["link", "pipe"])
def test_an_existing_file_is_never_used_as_the_temporary_file(
    tmp_path: Path, plant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if its name is predictable."""
    (tmp_path / "precious").write_bytes(b"of others")
    path = tmp_path / "out.npz"
    monkeypatch.setattr("secrets.token_hex", lambda n: "0" * 2 * n)
    with common.replacing(path) as partial:
        pass
    path.unlink()
    if plant == "link":
        partial.symlink_to("precious")
    else:
        os.mkfifo(partial)
    with pytest.raises(common.OutputError, match="File exists"), common.replacing(path) as again:
        again.write_bytes(b"ours")
    common.remove_partials([path])
    assert (partial.is_symlink(), partial.is_fifo()) == (plant == "link", plant == "pipe")
    assert (tmp_path / "precious").read_bytes() == b"of others"
    assert not path.exists()


def test_an_output_that_is_a_link_stays_a_link(photo: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out.npz").symlink_to("disk/out.npz")
    features(photo, tmp_path / "out.npz", *model(), *FAST)
    assert (tmp_path / "out.npz").is_symlink()
    assert np.load(tmp_path / "disk/out.npz")["field"].shape == (64, 12, 16)


# ---- names and kinds of images ------------------------------------------------------------------


def test_a_name_that_stdout_cannot_encode_is_printed_with_escapes(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed_to = tmp_path / "stdout"
    stdout = printed_to.open("w", encoding="latin-1")
    not_utf8 = os.fsdecode(b"caf\xe9\n\x1b[1m.safetensors")
    for name, printed in (("\u56fe.npz", b"\\u56fe.npz"), (not_utf8, rb"caf\udce9\n\x1b[1m.saf")):
        command = ["srt-ext", "features", photo, "-o", tmp_path / name, *model(), *FAST]
        monkeypatch.setattr("sys.argv", [str(word) for word in command])
        monkeypatch.setattr("sys.stdout", stdout)
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code in (0, None)
        assert (tmp_path / name).exists()
        assert b"wrote " + os.fsencode(tmp_path) + b"/" + printed in printed_to.read_bytes()


def test_a_closed_or_full_stdout_does_not_stop_the_command(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` leaves it
    full, full_disk = os.open("/dev/full", os.O_WRONLY), "stdout cannot be written: No space left"
    for handle, message in ((writer, None), (full, full_disk)):
        stdout, output = os.fdopen(handle, "w"), tmp_path / f"{handle}.npz"
        monkeypatch.setattr("sys.stdout", stdout)
        command = ["srt-ext", "features", photo, "-o", output, *model(), *FAST]
        monkeypatch.setattr("sys.argv", [str(word) for word in command])
        with pytest.raises(SystemExit) as end:
            main()
        assert message in end.value.code if message else end.value.code in (0, None)
        assert output.exists()


def exif(entries: bytes) -> bytes:
    """A TIFF header and the entries of a directory: (tag, type, count, value or its offset)."""
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(entries) // 12) + entries + bytes(4)


ORIENTATION = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)  # to be rotated by 90 degrees


@pytest.mark.parametrize(
    ("block", "size"),
    [
        (exif(ORIENTATION), (24, 40)),
        (exif(ORIENTATION)[:-9], None),
        (b"Exif\0\0", (40, 24)),
        (b"Exif\0\0no header", (40, 24)),
        (exif(struct.pack(">HHII", 0x0112, 2, 4, 0xFFFFFFF0)), (40, 24)),
        (exif(struct.pack(">HHII", 0x8769, 4, 1, 8) + ORIENTATION), None),  # contains itself
        (exif(struct.pack(">HHII", 0x010E, 2, 2**32 - 1, 8) + ORIENTATION), None),
        (exif(ORIENTATION * 3000), (24, 40)),
        (exif(struct.pack(">HHIHH", 0x0112, 3, 1, 99, 0)), (40, 24)),
    ],
)
def test_images_with_broken_exif_are_read(
    block: bytes, size: tuple[int, int] | None, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """In either orientation, if part of the EXIF data can be read."""
    pixels = np.full((24, 40, 3), 99, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=block)
    image = open_image(tmp_path / "a.jpg")
    assert image.size == size or (size is None and set(image.size) == {24, 40})
    assert np.abs(np.asarray(image).astype(int) - 99).max() <= 1
    assert not recwarn.list


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16"]
)
def test_images_of_every_mode_are_converted_to_rgb(mode: str, tmp_path: Path) -> None:
    Image.new(mode, (5, 4)).save(tmp_path / "a.tif")
    if mode == "YCbCr" and int(pillow_version.split(".")[0]) < 13:
        pytest.skip("Pillow cannot read its own file")
    assert (open_image(tmp_path / "a.tif").mode, open_image(tmp_path / "a.tif").size) == (
        "RGB",
        (5, 4),
    )


def test_an_animation_is_read_as_its_first_frame(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (9, 9), color) for color in ("red", "blue"))
    for name in ("a.gif", "a.png", "a.webp", "a.tif"):
        first.save(tmp_path / name, save_all=True, append_images=[second])
        assert open_image(tmp_path / name).getpixel((4, 4))[0] > 240


# ---- the user's weights -------------------------------------------------------------------------


def loaded(
    state: dict[str, torch.Tensor], path: Path, name: str = SMALL
) -> dict[str, torch.Tensor]:
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    state = hub.load_timm(name, path)[0].state_dict()
    assert all(value.isfinite().all() for value in state.values())
    return dict(state)


def test_weights_may_have_another_classifier_or_none(tmp_path: Path) -> None:
    state, file = load_file(small_weights()), tmp_path / os.fsdecode(b"mine\xff.safetensors")
    plain = {key: value for key, value in state.items() if not key.startswith("head.")}
    assert len(plain) == len(state) - 2
    more = {"head.weight": torch.ones(10, 64), "head.bias": torch.ones(10)}
    for mine in (plain, {**plain, **more}, {f"module.{k}": v for k, v in plain.items()}):
        got = loaded(mine, file)
        assert all(got[key].equal(value) for key, value in plain.items())
        assert not got["head.weight"].any()  # the same in every run
    assert loaded({f"timm_model.{k}": v for k, v in state.items()}, file)["head.weight"].any()
    for wrong, message in (
        ({**plain, "blocks.0.attn.more": torch.ones(1)}, "blocks.0.attn.more must be absent"),
        (
            {k: v for k, v in state.items() if k != "norm.bias"},
            r"norm.bias must be \[64\], got none",
        ),
        (
            {**plain, "norm.bias": torch.ones(64, dtype=torch.int8)},
            "floating-point, got torch.int8. Pass weights that are floating-point and finite",
        ),
    ):
        with pytest.raises(hub.ModelError, match=message):
            loaded(wrong, file)


def test_weights_may_be_a_part_of_a_larger_module(tmp_path: Path, photo: Path) -> None:
    state, file = load_file(small_weights()), tmp_path / "mine.safetensors"
    other = {"n_averaged": torch.ones(()), "model.decoder.weight": torch.ones(3, 64)}
    mine = {**{f"model.backbone.{key}": value for key, value in state.items()}, **other}
    with pytest.warns(
        UserWarning, match=r"tensors model.backbone.\* .* are used; ignored: .* 1 more"
    ):
        got = loaded(mine, file)
    assert all(got[key].equal(value) for key, value in state.items())
    options = ("--model", SMALL, "--weights", file, *FAST)
    assert "note: only the tensors " in run("features", photo, "-o", tmp_path / "out.npz", *options)
    two = {
        f"{name}.{key}": value.clone()
        for name in ("student", "teacher")
        for key, value in state.items()
    }
    with pytest.raises(hub.ModelError, match=r"the prefixes 'student\.', 'teacher\.'\. Save"):
        loaded(two, file)
    with pytest.raises(hub.ModelError, match=r"norm.bias must be finite, got NaN or infinities"):
        loaded({**state, "norm.bias": torch.full((64,), 1e300, dtype=torch.float64)}, file)


@pytest.mark.parametrize(
    "part", ["module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"]
)
@pytest.mark.parametrize("prefix", ["", "backbone.module."])
def test_wrappers_of_blocks_are_removed_from_the_names(
    part: str, prefix: str, tmp_path: Path
) -> None:
    state, file = load_file(small_weights()), tmp_path / "mine.safetensors"
    mine = {
        prefix + re.sub(r"(^blocks\.\d+\.|attn\.)", rf"\1{part}.", key): value
        for key, value in state.items()
    }
    assert f"{prefix}blocks.0.{part}.attn.{part}.qkv.weight" in mine
    got = loaded(mine, file)
    assert all(got[key].equal(value) for key, value in state.items())
    twice = {**mine, f"{prefix}blocks.0.norm1.bias": torch.ones(64)}
    with pytest.raises(
        hub.ModelError, match=rf"two tensors for one weight, .*{part}.norm1.bias and "
    ):
        loaded(twice, file)


@pytest.mark.skipif(not timm.is_model("iformer_t"), reason="an older timm")
def test_parts_of_the_model_with_the_name_of_a_wrapper_are_kept(tmp_path: Path) -> None:
    state = timm.create_model("iformer_t").state_dict()
    assert any(".module." in key for key in state)
    mine = {f"module.{key}": value for key, value in state.items()}
    got = loaded(mine, tmp_path / "mine.safetensors", "iformer_t")
    assert all(got[key].equal(value) for key, value in state.items())


ADAPTED = "blocks.0.attn.qkv."


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((f"base_model.model.{ADAPTED}base_layer.weight",), "save the .* its merge_and_unload"),
        ((f"{ADAPTED}base_layer.weight", f"{ADAPTED}lora_A.default.weight"), "merge_and_unload"),
        ((f"model.base_model.model.{ADAPTED}lora_A.weight",), "merge_and_unload"),
        ((f"{ADAPTED}parametrizations.weight.original1",), "Call .*remove_parametrizations before"),
        (("base_layer.0.weight",), "Select the timm model of these weights"),  # as in timm's DLA
    ],
)
def test_errors_of_weights_explain_how_to_save_them(
    names: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    state = load_file(small_weights())
    weight = state.pop(f"{ADAPTED}weight")
    mine = {**state, **{name: weight.clone() for name in names}}
    with pytest.raises(hub.ModelError, match=message):
        loaded(mine, tmp_path / "mine.safetensors")


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"global_pool": "avg"}, "norm.weight must be"),
        ({"class_token": False, "global_pool": "avg"}, "cls_token must be"),
        ({"img_size": (128, 256)}, "pos_embed must be"),
        ({"reg_tokens": 4}, "pos_embed must be"),
        ({"qk_norm": True}, "k_norm.bias must be absent"),
        ({"in_chans": 1}, "proj.weight must be"),
    ],
)
def test_models_with_other_arguments_load_from_a_folder_as_the_error_advises(
    arguments: dict[str, Any], rule: str, tmp_path: Path, photo: Path
) -> None:
    vit = timm.create_model(SMALL, **arguments).eval()
    with pytest.raises(hub.ModelError, match=rule) as error:
        loaded(vit.state_dict(), tmp_path / "mine.safetensors")
    scope = {"timm": timm, "model": vit, "FOLDER": tmp_path / "mine", "ARGUMENTS": arguments}
    eval(hub.SAVE, scope)
    options = ("--model", f"local-dir:{tmp_path / 'mine'}", *FAST)
    if "in_chans" in arguments:
        assert str(error.value).endswith(hub.NO_RGB)
        text = run("features", photo, "-o", tmp_path / "out.npz", *options, code=1)
        assert "must have in_chans=3; got in_chans=1. The command reads RGB images" in text
        return
    assert f"{hub.SAVE} and pass --model local-dir:FOLDER" in str(error.value)
    state = hub.load_timm(f"local-dir:{tmp_path / 'mine'}")[0].state_dict()
    assert all(state[key].equal(value) for key, value in vit.state_dict().items())
    run("features", photo, "-o", tmp_path / "out.npz", *options)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["ViTModel"]}, "must be a model of timm; got None. timm.models.save"),
        ({"architecture": "vit_mine"}, "must be a model of timm; got 'vit_mine'"),
        ({"architecture": [SMALL]}, "must be a model of timm; got .*For a model of another"),
        ([], "must be a model of timm; got None"),
        ("{", "config.json must be JSON: Expecting property name"),
        (b"\xff", "config.json must be JSON: 'utf-8' codec"),
        (
            {"architecture": SMALL, "model_args": {"foo": 1}},
            "timm cannot create .*foo.*save_for_hf",
        ),
        ({"architecture": SMALL, "model_args": {"in_chans": 6}}, "=3; got in_chans=6. The command"),
        ({"architecture": SMALL, "input_size": [1, 160, 160]}, "=3; got in_chans=1"),
        ({"architecture": SMALL, "mean": 0.5}, "mean in .*config.json must be 3 numbers; got 0.5"),
        ({"architecture": SMALL, "std": [1] * 4}, r"std in .*config.json must be .*; got \[1, 1"),
        (
            {"architecture": SMALL, "model_args": {"global_pool": "avg"}},
            "fc_norm.weight must be .*model_args in config.json must be the arguments",
        ),
    ],
)
def test_a_folder_must_be_of_timm_and_for_rgb_images(
    config: Any, message: str, tmp_path: Path
) -> None:
    shutil.copy(small_weights(), tmp_path / "model.safetensors")
    if isinstance(config, dict) and "model_args" in config:
        config["pretrained_cfg"] = {"input_size": [3, 160, 160]}
    text = config if isinstance(config, (str, bytes)) else json.dumps(config)
    (tmp_path / "config.json").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(hub.ModelError, match=message):
        hub.load_timm(f"local-dir:{tmp_path}")


def test_position_embeddings_of_another_size_are_resampled_and_patches_are_not(
    tmp_path: Path,
) -> None:
    state, file = load_file(small_weights()), tmp_path / "mine.safetensors"
    large = timm.create_model(SMALL, img_size=192).state_dict()
    assert large["pos_embed"].shape != state["pos_embed"].shape
    large["pos_embed"] = torch.ones_like(large["pos_embed"])
    torch.testing.assert_close(
        loaded(large, file)["pos_embed"], torch.ones_like(state["pos_embed"])
    )
    state["patch_embed.proj.weight"] = torch.ones(64, 3, 14, 14)
    with pytest.raises(hub.ModelError, match=r"proj.weight must be \[64, 3, 16, 16\], got .*14"):
        loaded(state, file)


def model_folder(path: Path, weights: str) -> Path:
    """A folder as timm's push_to_hf_hub writes it, with another number of classes."""
    path.mkdir(parents=True)
    config = {"architecture": SMALL, "num_classes": 10, "model_args": {"img_size": 96}}
    config["pretrained_cfg"] = {
        "mean": [0.1, 0.2, 0.3],
        "num_classes": 10,
        "input_size": [3, 96, 96],
    }
    (path / "config.json").write_text(json.dumps(config))
    state = timm.create_model(SMALL, num_classes=10, img_size=96).state_dict()
    if weights.endswith(".safetensors"):
        save_file(state, path / weights)
    else:
        torch.save(state, path / weights)
    return path


@pytest.mark.parametrize("weights", ["model.safetensors", "best.safetensors"])
def test_a_local_folder_of_timm(
    tmp_path: Path, photo: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model_folder(tmp_path / "caf\u00e9 [1]", weights)
    monkeypatch.setenv("HOME", str(tmp_path))
    vit, config = hub.load_timm(f"local-dir:~/{path.name}")
    assert vit.head.out_features == 10
    assert config["mean"] == [0.1, 0.2, 0.3]
    state = load_file(path / weights)
    assert all(value.equal(state[key]) for key, value in vit.state_dict().items())
    _, tensors = features(photo, tmp_path / "out.npz", "--model", f"local-dir:{path}", *FAST)
    image = normalised(photo, config["mean"], config["std"])
    torch.testing.assert_close(tensors["field"], SRT(vit, "grid:1", stride=4)(image).field[0])


def test_pickles_are_not_loaded(
    tmp_path: Path, fake_hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("torch.load")

    def absent(*_: Any, **__: Any) -> None:
        raise OSError("404")

    monkeypatch.setattr(torch, "load", fail)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    path = model_folder(tmp_path / "model", "pytorch_model.bin")
    with pytest.raises(
        hub.ModelError, match=r"has no model.safetensors. Pickles .* are not loaded; save"
    ):
        hub.load_timm(f"local-dir:{path}")
    fake_hub.answers = True
    monkeypatch.setattr("huggingface_hub.hf_hub_download", absent)
    with pytest.raises(hub.PretrainedError, match=r"no model.safetensors in timm/test_vit.r160"):
        hub.load_timm(f"{SMALL}.r160_in1k")
    only_url = timm.get_pretrained_cfg(SMALL)
    only_url.hf_hub_id, only_url.url = None, "https://example.org/vit.pth"
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda _name: only_url)
    with pytest.raises(hub.PretrainedError, match=r"vit.pth is a pickle; pickles are not loaded"):
        hub.load_timm(SMALL)


@pytest.mark.parametrize(
    "name", ["foo:bar", "local-dir:/nothere", "local-dir:~nobody_/x", "hf-hub:", "hf-hub:a b"]
)
def test_a_wrong_name_is_a_model_error(name: str) -> None:
    with pytest.raises(hub.ModelError) as error:
        hub.load_timm(name)
    assert type(error.value) is hub.ModelError


@pytest.mark.parametrize("weights", ["model.safetensors", "open_clip_model.safetensors"])
def test_a_model_of_the_hub_comes_from_its_cache(
    tmp_path: Path, fake_hub: Hub, weights: str
) -> None:
    name = "hf-hub:timm/mine"
    with pytest.raises(hub.PretrainedError, match="not in the local cache"):
        hub.load_timm(name)
    assert len(fake_hub.asked) == 1
    path = model_folder(tmp_path / "model", "model.safetensors")
    fake_hub.keep("mine", load_file(path / "model.safetensors"))
    snapshot = fake_hub.folder / "models--timm--mine/snapshots/abc"
    shutil.copy(path / "config.json", snapshot / "config.json")
    (snapshot / "model.safetensors").rename(snapshot / weights)
    vit, config = hub.load_timm(name)
    assert (vit.head.out_features, config["mean"]) == (10, [0.1, 0.2, 0.3])
    # A request for the first file: the cache does not store that the hub does not have it.
    assert len(fake_hub.asked) == 1 + (weights != "model.safetensors")


# ---- the default model --------------------------------------------------------------------------


class Hub:
    """A cache of the hub, and a record of the requests of its client."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answers = False
        self.asked: list[str] = []

    def head(self, url: str, timeout: float) -> None:
        self.asked.append(url)
        if not self.answers:
            raise ConnectionError("no network")

    def keep(self, name: str, state: dict[str, torch.Tensor]) -> None:
        """Stores pretrained weights in the cache, as the client does."""
        path = self.folder / f"models--timm--{name}"
        for part, content in (("refs/main", "abc"), ("snapshots/abc/config.json", "{}")):
            (path / part).parent.mkdir(parents=True)
            (path / part).write_text(content)
        save_file(state, path / "snapshots/abc/model.safetensors")


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """An empty cache, without a network."""
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(made.folder))
    monkeypatch.setattr("huggingface_hub.get_session", lambda: made)
    return made


def test_without_a_network_the_default_is_the_small_model(
    photo: Path, fake_hub: Hub, tmp_path: Path
) -> None:
    output = tmp_path / "out.safetensors"
    text, _ = features(photo, output, *FAST)
    note = f"note: the weights of {common.DEFAULT_MODEL} are not available (not in the local cache"
    assert text.count(note) == 1
    assert "using the included small ViT; select another model with --model or" in text
    assert len(fake_hub.asked) == 1
    assert metadata(output)["model"] == "small"


@pytest.mark.slow
def test_the_fallback_is_one_line_of_stderr(photo: Path, tmp_path: Path) -> None:
    """Without warnings or retries of the client of the hub."""
    options = ("features", photo, "-o", tmp_path / "out.safetensors", "--views", "grid:1")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    errors = run_python("-m", "srt_ext", *options, env=offline, cwd=ROOT).stderr
    assert errors.count("\n") == 1
    assert errors.startswith(f"note: the weights of {common.DEFAULT_MODEL} are not available ")


@pytest.mark.parametrize("tag", ["", ".r160_in1k", ".nonsense"])
def test_a_named_model_is_never_replaced(
    photo: Path, fake_hub: Hub, tmp_path: Path, tag: str
) -> None:
    output = tmp_path / "out.npz"
    text = run("features", photo, "-o", output, "--model", SMALL + tag, code=1)
    assert text.count("\n") == 1
    assert text.startswith(f"error: the pretrained weights of {SMALL + tag} are not available: ")
    assert ("tag (nonsense)" if tag == ".nonsense" else "cannot be reached (Conn") in text
    assert "--weights" in text
    assert not output.exists()


def test_the_default_is_a_dinov2_from_the_cache(photo: Path, fake_hub: Hub, tmp_path: Path) -> None:
    vit = timm.create_model(common.DEFAULT_MODEL, dynamic_img_size=True).eval()
    fake_hub.keep(common.DEFAULT_MODEL, vit.state_dict())
    output = tmp_path / "out.safetensors"
    text, tensors = features(photo, output, "--views", "grid:1", "--size", 64)
    assert "note" not in text
    assert fake_hub.asked == []
    assert metadata(output)["model"] == common.DEFAULT_MODEL
    image = normalised(photo, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    expected = SRT(vit, views.grid(1).offsets)(image)
    assert expected.field.shape[1:] == (384, 48, 64)  # of 4 x 5 patches of 14 pixels
    torch.testing.assert_close(tensors["field"], expected.field[0])


def test_the_hub_is_queried_once(fake_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client is called only if the hub answers; its errors are reported."""
    name = f"{SMALL}.r160_in1k"
    tried: list[Any] = []

    def download(*arguments: Any, **_: Any) -> None:
        tried.append(arguments)
        raise OSError("no such file there")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(hub.PretrainedError, match=r"cannot be reached \(ConnectionError"):
        hub.load_timm(name)
    assert (len(fake_hub.asked), len(tried)) == (1, 0)
    fake_hub.answers = True
    with pytest.raises(hub.PretrainedError, match="OSError: no such file there"):
        hub.load_timm(name)
    assert len(fake_hub.asked) == 2
    assert tried == [("timm/test_vit.r160_in1k", "model.safetensors")]

    state = timm.create_model(name).state_dict()
    fake_hub.keep(name, state)
    loaded = hub.load_timm(name)[0].state_dict()
    assert all(tensor.equal(loaded[key]) for key, tensor in state.items())
    assert len(fake_hub.asked) == 2


def test_scale_and_quality_are_passed_to_srt(photo: Path, tmp_path: Path) -> None:
    vit, config = load_small()
    image = normalised(photo, config["mean"], config["std"])
    common: Any = ("--stride", 4, "--model", "small")
    for options, settings in (
        (("--scale", 1.5, "--views", "3+flip"), {"scale": 1.5, "views": "3+flip"}),
        (("--quality", "outlines"), {"quality": "outlines"}),
        ((), {}),
    ):
        text, tensors = features(photo, tmp_path / "out.npz", *common, *options)
        srt = SRT(vit, stride=4, **settings)
        torch.testing.assert_close(tensors["field"], srt(image).field[0])
        assert f"scale {srt.scale:g}, {len(srt.views.offsets)} views" in text


def test_the_small_model_by_name(photo: Path, fake_hub: Hub, tmp_path: Path) -> None:
    vit, config = load_small()
    more = {k: v + 1 for k, v in vit.state_dict().items()}
    save_file(more, tmp_path / "more.safetensors")
    image = normalised(photo, config["mean"], config["std"])
    for options in ((), ("--weights", tmp_path / "more.safetensors")):
        settings = (*FAST, "--model", "small", *options)
        text, tensors = features(photo, tmp_path / "out.npz", *settings)
        assert "note" not in text
        if options:
            vit.load_state_dict(more)
        expected = SRT(vit, views.grid(1).offsets, stride=4)(image).field[0]
        torch.testing.assert_close(tensors["field"], expected)
    assert fake_hub.asked == []


# ---- info, help, missing packages ---------------------------------------------------------------


def test_info_prints_backends_and_whether_the_default_model_is_cached(fake_hub: Hub) -> None:
    text = run("info")
    for word in ("srt_ext", "torch", "CPU", "CUDA", torch.ops.srt._cpu_kernels(), "timm"):
        assert word in text
    assert re.search(r"srt_ext.numpy +(not available: |\w+ \(of .*\), \d+ threads)", text)
    assert re.search(r"srt_ext.jax +(not available: |jax \d)", text)
    assert re.search(rf"default model +{common.DEFAULT_MODEL}: not in the local", text)
    fake_hub.keep(common.DEFAULT_MODEL, {})
    assert re.search(rf"default model +{common.DEFAULT_MODEL}: in the local", run("info"))
    assert fake_hub.asked == []


def test_help_lists_the_commands() -> None:
    assert all(name in run("--help") for name in ("demo", "show", "features", "spot", "info"))


@pytest.mark.slow
def test_missing_packages_are_reported_without_typer_and_torch() -> None:
    script = (
        "import sys; sys.modules['typer'] = sys.modules['torch'] = None\n"
        "from srt_ext.__main__ import main; main()"
    )
    errors = run_python("-c", script, code=1, cwd=ROOT).stderr
    assert "the command needs packages that are not installed" in errors
    assert "no torch ops: torch is not installed" in errors
    assert re.search("srt_ext.numpy is (not )?available", errors)
