"""``python -m research.robustness.files``: attacks on ``srt-ext features``.

Damaged images among good ones; SIGKILL at random moments, then the same command again; two runs
into one folder; a full disk and a read-only disk. Every image must be written or reported, no run
may hang, and the files must be bitwise equal to those of an undisturbed run. Prints counts and
seconds; exits with status 1 on a fault.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from PIL import Image
from safetensors.torch import load_file

SETTINGS = ("--model=small", "--views=best:2", "--stride=8", "--size=64")
FORMATS = {  # of Pillow: suffix and options for saving
    "PNG": ("png", {}),
    "JPEG": ("jpg", {}),
    "GIF": ("gif", {}),
    "BMP": ("bmp", {}),
    "TIFF": ("tif", {"compression": "tiff_lzw"}),
    "WEBP": ("webp", {"lossless": True}),
    "AVIF": ("avif", {}),
    "JPEG2000": ("jp2", {}),
    "PPM": ("ppm", {}),
    "TGA": ("tga", {"compression": "tga_rle"}),
    "SGI": ("sgi", {}),
    "PCX": ("pcx", {}),
    "ICO": ("ico", {}),
    "DDS": ("dds", {}),
}


class Faults:
    """Counts faults and prints each one."""

    def __init__(self) -> None:
        self.count = 0

    def check(self, right: bool, message: str) -> None:
        if not right:
            self.count += 1
            print(f"  FAULT: {message}", flush=True)


# ---- runs ---------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A finished command."""

    code: int
    out: str
    errors: list[str]
    seconds: float

    def error_about(self, text: str) -> bool:
        return sum(line.startswith("error: ") and text in line for line in self.errors) == 1


def start(photos: Path, out: Path, *options: str) -> subprocess.Popen[bytes]:
    """``srt-ext features`` in a process group of its own."""
    command = [sys.executable, "-m", "srt_ext", "features", photos, "-o", out, *SETTINGS, *options]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([str(c) for c in command], **streams, start_new_session=True)


def finish(process: subprocess.Popen[bytes], faults: Faults, limit: float) -> Run:
    begin = time.perf_counter()
    try:
        out, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        faults.check(False, f"a run hangs: not finished within {limit:.0f} s")
        os.killpg(process.pid, signal.SIGKILL)
        out, errors = process.communicate()
    lines = errors.decode(errors="backslashreplace").splitlines()
    faults.check(not any("Traceback" in line for line in lines), "\n".join(lines[-20:]))
    seconds = time.perf_counter() - begin
    return Run(process.returncode, out.decode(errors="backslashreplace"), lines, seconds)


def run(photos: Path, out: Path, faults: Faults, *options: str, limit: float = 120) -> Run:
    return finish(start(photos, out, *options), faults, limit)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def written(out: Path) -> int:
    """The number of finished files in a folder."""
    return sum(name[0] != "." for name in os.listdir(out)) if out.exists() else 0


def good_pictures(folder: Path, count: int, rng: np.random.Generator) -> Path:
    folder.mkdir()
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


# ---- damaged images -----------------------------------------------------------------------------


def encoded(kind: str, size: tuple[int, int], rng: np.random.Generator) -> bytes:
    """An encoded image of size (width, height)."""
    pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    pixels[size[1] // 2 :] = 90  # a compressible half
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **FORMATS[kind][1])
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def png(width: int, height: int, *more: bytes) -> bytes:
    """A grey PNG of any size, in a few bytes; ``more``: chunks before the pixels."""
    row = zlib.compressobj(9)
    lines = min(height, 4096)
    data = b"".join(row.compress(bytes(1 + width)) for _ in range(lines)) + row.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    parts = (header, *more, chunk(b"IDAT", data), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def special_pictures(rng: np.random.Generator) -> dict[str, bytes]:
    """Decompression bombs, sides at their limits, malformed blocks."""
    packed = zlib.compress(bytes(80 * 2**20), 9)  # 80 MB of text
    made = {
        "bomb.png": png(65535, 65535),
        "limit.png": png(2**31 - 1, 1)[:200] + bytes(50),
        "wide.png": png(65535, 1),
        "high.png": png(1, 65535),
        "dot.png": png(1, 1),
        "text.png": png(9, 9, chunk(b"zTXt", b"a\0\0" + packed)),
        "texts.png": png(9, 9, *[chunk(b"tEXt", b"k%d\0v" % i) for i in range(5000)]),
        "profile.png": png(9, 9, chunk(b"iCCP", b"a\0\0" + packed)),
        "empty.png": b"",
        "empty.jpg": b"",
        "html.jpg": b"<!doctype html><title>404</title>",
        "program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop\n",
    }
    for kind in ("JPEG", "BMP", "PPM", "TGA", "JPEG2000", "WEBP"):  # WebP ends at 16383
        for side, other in ((16383 if kind == "WEBP" else 65500, 3), (3, 9000)):
            made[f"{side}x{other}.{FORMATS[kind][0]}"] = encoded(kind, (side, other), rng)
    jpeg = encoded("JPEG", (64, 48), rng)
    frame = jpeg.index(b"\xff\xc0") + 5  # height, width
    for height, width in ((65535, 65535), (0, 0), (65535, 1), (1, 65535)):
        sides = struct.pack(">HH", height, width)
        made[f"claims{height}x{width}.jpg"] = jpeg[:frame] + sides + jpeg[frame + 4 :]
    for i in range(40):  # random EXIF bytes after a valid header
        block = b"Exif\0\0MM\0*\0\0\0\x08" + rng.bytes(int(rng.integers(2, 400)))
        made[f"exif{i}.jpg"] = (
            jpeg[:2] + struct.pack(">HH", 0xFFE1, len(block) + 2) + block + jpeg[2:]
        )
    return made


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Content with one damage: truncated, bytes changed, a part overwritten, duplicated or removed.

    Headers are damaged more often.
    """
    data, n = bytearray(content), len(content)
    place = int(rng.integers(0, n if rng.random() < 0.5 else min(n, 100)))
    length = int(rng.integers(1, max(2, n // 4)))
    match rng.integers(0, 6):
        case 0:
            return bytes(data[:place])
        case 1:
            for _ in range(int(rng.integers(1, 30))):
                data[int(rng.integers(0, n))] ^= 1 << int(rng.integers(0, 8))
        case 2:
            data[place] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF]))
        case 3:
            data[place : place + 4] = bytes([int(rng.choice([0, 0x7F, 0xFF]))] * 4)
        case 4:
            data[place : place + length] = rng.bytes(length)
        case _:
            data[place:place] = data[: length if rng.random() < 0.5 else 0]
            del data[place + 2 * length : place + 3 * length]
    return bytes(data)


def attack_by_damage(folder: Path, count: int, faults: Faults, rng: np.random.Generator) -> None:
    """Damaged images; one image in eleven is good."""
    photos, good = folder / "damaged", set()
    photos.mkdir()
    for name, content in special_pictures(rng).items():
        (photos / name).write_bytes(content)
    kinds = list(FORMATS)
    for i in range(max(0, count - len(list(photos.iterdir())))):
        kind = kinds[i % len(kinds)]
        size = (int(rng.integers(8, 80)), int(rng.integers(8, 80)))
        name = f"bad{i}.{FORMATS[kind][0]}"
        (photos / name).write_bytes(damaged(encoded(kind, size, rng), rng))
    bad = {path.name for path in photos.iterdir()}
    for i in range(count // 10):
        kind = kinds[i % len(kinds)]
        name = f"good{i}.{FORMATS[kind][0]}"
        (photos / name).write_bytes(encoded(kind, (40, 32), rng))
        good.add(name)

    result = run(photos, folder / "out", faults, limit=1800)
    done = {name.removesuffix(".safetensors") for name in contents(folder / "out")}
    reported = {
        match[1]
        for line in result.errors
        if (match := re.match(rf"error: {re.escape(str(photos))}/([^ :]+)", line))
    }
    faults.check(result.code == 1, f"expected status 1, got {result.code}")
    faults.check(not done & reported, f"both written and reported: {sorted(done & reported)[:5]}")
    lost = (good | bad) - done - reported
    faults.check(not lost, f"{len(lost)} neither written nor reported: {sorted(lost)[:5]}")
    faults.check(good <= done, f"good images not written: {sorted(good - done)[:5]}")
    for name in done:
        field = load_file(folder / "out" / f"{name}.safetensors")["field"]
        faults.check(
            bool(field.isfinite().all()) and field.shape[0] == 128, f"invalid field of {name}"
        )
    sums = f"{len(done)} written, {len(reported)} reported"
    print(
        f"{len(bad)} damaged, {len(good)} good images: {sums}, {result.seconds:.0f} s", flush=True
    )


# ---- kills --------------------------------------------------------------------------------------


def attack_by_kill(
    folder: Path, kills: int, faults: Faults, rng: np.random.Generator, pictures: int = 300
) -> None:
    """SIGKILL of the run, or of its process group, at random moments."""
    photos = good_pictures(folder / "photos", pictures, rng)
    reference = run(photos, folder / "reference", faults)
    expected = contents(folder / "reference")
    faults.check(len(expected) == pictures, f"{len(expected)} of {pictures} images written")
    again = run(photos, folder / "again", faults)
    faults.check(contents(folder / "again") == expected, "two undisturbed runs differ")
    begin, duration = time.perf_counter(), min(reference.seconds, again.seconds)
    out, rounds, stages = folder / "killed", 0, {"start": 0, "work": 0, "end": 0}
    for i in range(kills):
        before = written(out)
        process = start(photos, out)
        if i % 2:  # while it writes
            last = before + int(rng.integers(0, pictures - before))
            while written(out) <= last and process.poll() is None:
                time.sleep(0.001)
            time.sleep(0.02 * rng.random())
        else:  # at any moment of the run
            time.sleep(duration * rng.random())
        ended = process.poll() is not None
        if not ended:  # surviving workers hold the lock for 5 seconds
            (os.killpg if i % 4 < 2 else os.kill)(process.pid, signal.SIGKILL)
        process.communicate()
        files = contents(out) if out.exists() else {}
        whole = {name: file for name, file in files.items() if not name.startswith(".")}
        stage = "end" if ended else "work" if len(whole) > before else "start"
        stages[stage] += 1
        wrong = [name for name, file in whole.items() if expected.get(name) != file]
        faults.check(not wrong, f"wrong files after kill {i}: {wrong[:5]}")
        if len(whole) == pictures or i == kills - 1 or rng.random() < 0.2:
            rounds += 1
            resumed = run(photos, out, faults)
            faults.check(
                resumed.code == 0, f"resumed: status {resumed.code}: {resumed.errors[-3:]}"
            )
            faults.check(
                contents(out) == expected, "resumed: files differ from the undisturbed run"
            )
            shutil.rmtree(out)
    seconds = time.perf_counter() - begin
    print(
        f"kills: {kills} in runs of {duration:.1f} s ({stages['start']} before the first new file, "
        f"{stages['work']} after it, {stages['end']} runs had ended), resumed to the end {rounds} "
        f"times, {pictures} images: {seconds:.0f} s",
        flush=True,
    )


# ---- two runs, and disks ------------------------------------------------------------------------


def attack_by_two(folder: Path, faults: Faults, rng: np.random.Generator, rounds: int = 5) -> None:
    photos = folder / "photos"
    expected, refused, begin = contents(folder / "reference"), 0, time.perf_counter()
    for i in range(rounds):
        out = folder / f"two{i}"
        first = start(photos, out)
        time.sleep(float(rng.random()))
        second = start(photos, out)
        for process in (first, second):
            result = finish(process, faults, 120)
            busy = result.error_about("another run is writing to")
            refused += busy
            faults.check(result.code == int(busy), f"two: status {result.code}: {result.errors}")
        faults.check(contents(out) == expected, "two runs: files differ from a single run")
    seconds = time.perf_counter() - begin
    print(
        f"two runs at once: {rounds} times, {refused} ended with an error, {seconds:.0f} s",
        flush=True,
    )


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[bool]:
    """Mount a tmpfs; yields whether that succeeded."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "srt_ext", str(place)]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def attack_by_disk(folder: Path, faults: Faults) -> None:
    """A disk that becomes full, then read-only, then larger."""
    photos, expected, begin = folder / "photos", contents(folder / "reference"), time.perf_counter()
    with small_disk(folder / "disk", "500k") as mounted:
        if not mounted:
            print("disk: skipped, tmpfs cannot be mounted here", flush=True)
            return
        out = folder / "disk" / "out"
        result = run(photos, out, faults)
        full = result.error_about("cannot be written: No space left on device")
        faults.check(result.code == 1 and full, f"full: {result.code}: {result.errors}")
        part = contents(out)
        faults.check(0 < len(part) < len(expected), f"full: {len(part)} files")
        faults.check(
            part.items() <= expected.items(), "full: files differ from the undisturbed run"
        )
        single = run(photos / "0.png", folder / "disk" / "0.npz", faults, "--stride=1", "--size=0")
        full = single.error_about("0.npz cannot be written: No space left on device")
        faults.check(single.code == 1 and full, f"full: {single.code}: {single.errors}")
        faults.check(not (folder / "disk" / "0.npz").exists(), "full: a partial file was left")

        remount(folder / "disk", "size=64m,ro")
        for target in (out, folder / "disk" / "new"):
            result = run(photos, target, faults)
            refused = result.error_about("cannot be written")
            faults.check(result.code == 1 and refused, f"read-only: {result.code}: {result.errors}")
        faults.check(contents(out) == part, "read-only: files have changed")
        remount(folder / "disk", "rw")
        faults.check(run(photos, out, faults).code == 0, "larger: the run was not resumed")
        faults.check(contents(out) == expected, "larger: files differ from the undisturbed run")
    seconds = time.perf_counter() - begin
    print(f"disk: full after {len(part)} files, read-only, resumed: {seconds:.0f} s", flush=True)


def main(
    pictures: Annotated[int, typer.Option(min=100, help="Number of damaged images.")] = 2000,
    kills: Annotated[int, typer.Option(min=1, help="Number of runs to kill.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of damage and moments.")] = 0,
) -> None:
    faults, begin = Faults(), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        attack_by_damage(folder, pictures, faults, np.random.default_rng([seed, 0]))
        attack_by_kill(folder, kills, faults, np.random.default_rng([seed, 1]))
        attack_by_two(folder, faults, np.random.default_rng([seed, 2]))
        attack_by_disk(folder, faults)
    print(f"{faults.count} faults, {time.perf_counter() - begin:.0f} s")
    raise typer.Exit(int(faults.count > 0))


if __name__ == "__main__":
    typer.run(main)
