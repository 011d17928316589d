"""``srt-ext features --engine ray``: output, second runs, and errors."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("ray")

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from cli import SMALL, crops, run, small_weights
from PIL import Image
from pyarrow.fs import FSSpecHandler, PyFileSystem
from safetensors.torch import load_file

import srt_ext
from research.extraction import descendants
from srt_ext import data
from srt_ext.cli import dataset
from srt_ext.ray import pca, sink

OPTIONS = {"model": SMALL, "weights": small_weights(), "views": "grid:1", "stride": 8}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images of two sizes, one of them in a subfolder, and a file that is not an image."""
    path = tmp_path / "photos"
    (path / "trip").mkdir(parents=True)
    for i, pixels in enumerate(crops(5)):
        Image.fromarray(pixels if i % 2 else pixels[:32]).save(path / f"{i}.png")
    Image.fromarray(crops(1)[0]).save(path / "trip/b.png")
    (path / "bad.jpg").write_bytes(b"no picture")
    return path


NAMES = ["0.png", "1.png", "2.png", "3.png", "4.png", "trip/b.png"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "new/out"


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=4, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(dataset.ray, "init", refuse)


def arguments(source: object, out: object, **changed: object) -> list[object]:
    settings = OPTIONS | {"engine": "ray"} | changed
    options = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in settings.items()
        if value is not None
    ]
    return ["features", source, "-o", out, *options]


def extract(source: object, out: object, code: int = 0, **changed: object) -> str:
    return run(*arguments(source, out, **{"actors": 2, **changed}), code=code)


def keys(out: Path) -> list[str]:
    return sorted(data.open(out).keys.to_pylist())


# ---- without a cluster --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"engine": None, "pca": 4}, "--pca requires --engine ray"),
        ({"engine": None, "batch": 4}, "--batch requires --engine ray"),
        ({"workers": 2}, "--workers must be omitted with --engine"),
        ({"pca": "nothing.npy"}, "existing .npy file; got nothing.npy"),
        ({"pca": "."}, "existing .npy file; got ."),
        ({"column": "image"}, "column and key require .parquet files"),
    ],
)
def test_invalid_options_are_errors(
    photos: Path, out: Path, changed: dict[str, object], message: str, no_cluster: None
) -> None:
    changed = {"actors": None, **changed}
    assert message in extract(photos, out, code=1, **changed)
    assert not out.exists()


@pytest.mark.parametrize("engine", ["ray", None])
def test_a_dry_run_writes_nothing(
    photos: Path, out: Path, engine: str | None, no_cluster: None
) -> None:
    changed = {"engine": engine, "actors": None, "dtype": "float16"}
    text = run(*arguments(photos, out, **changed), "--dry-run")
    assert "images: 7, done: 0" in text
    assert "views grid:1, scale 1, stride 8" in text
    sizes = [(4 + 2 * (i % 2)) * 8 * 64 * 2 for i in range(5)] + [6 * 8 * 64 * 2]
    low, high = (n * 1e-3 for n in (min(sizes), max(sizes) + 64 * 2))
    found = float(text.split("about ")[1].split(" kB per image")[0])
    assert low <= found <= high
    assert "in one process on this machine" in text
    assert not out.exists()


def test_limit_restricts_the_images_of_a_folder(photos: Path, out: Path) -> None:
    text = run(*arguments(photos, out, engine=None, limit=2))
    assert "2 images: 2 written" in text
    assert sorted(path.name for path in out.iterdir()) == [f"{i}.png.safetensors" for i in (0, 1)]


def test_other_settings_and_finished_outputs_need_no_cluster(
    photos: Path, out: Path, no_cluster: None
) -> None:
    data.write_settings({"model": "another", "pca": "none"}, *data.filesystem(str(out)))
    text = extract(photos, out, code=1)
    assert "was written with other settings (" in text
    assert f"model another, now {SMALL}" in text


def test_uncommitted_files_are_removed(out: Path) -> None:
    files = {
        "checkpoint/a.pending.parquet": True,  # of Ray: it also names the data to remove
        "errors/a.parquet": False,
        "checkpoint/b.parquet": True,
        "checkpoint/b.pending.parquet": False,  # of a task that ran again after its commit
        "errors/b.parquet": True,
        "errors/c.parquet": True,
        "partial/d.parquet": False,
    }
    for name in files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"")
    sink.remove_uncommitted(*data.filesystem(str(out)))
    assert {name: (out / name).exists() for name in files} == files


def test_forget_failures_also_removes_the_completion_mark(out: Path) -> None:
    """So that a run that is stopped afterwards still computes the failed images."""
    for folder in ("checkpoint", "data", "errors"):
        (out / folder).mkdir(parents=True)
    (out / "complete.json").write_text("{}")
    pq.write_table(pa.table({"__id__": ["x", "y", "y\0row 3"]}), out / "checkpoint/a.parquet")
    pq.write_table(pa.table({"key": ["x"]}), out / "data/a.parquet")
    pq.write_table(pa.table({"key": ["y", "y"]}), out / "errors/a.parquet")
    pq.write_table(pa.table({"__id__": ["z"]}), out / "checkpoint/b.parquet")
    pq.write_table(pa.table({"key": ["z"]}), out / "errors/b.parquet")
    sink.forget_failures(*data.filesystem(str(out)))
    left = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    assert left == ["checkpoint/a.parquet", "data/a.parquet"]
    assert pq.read_table(out / "checkpoint/a.parquet").to_pydict() == {"__id__": ["x"]}


GPU_NODE = {"CPU": 64.0, "GPU": 8.0}


@pytest.mark.parametrize(
    ("nodes", "actors", "placed"),
    [
        ([{"CPU": 4}], None, (1, {"num_cpus": 2})),
        ([{"CPU": 4}], 2, (2, {"num_cpus": 1})),
        ([{"CPU": 4}, {"CPU": 4}], 1, (1, {"num_cpus": 3})),  # on one node
        ([{"CPU": 18}], None, (7, {"num_cpus": 2})),
        ([GPU_NODE, {"CPU": 320}], None, (8, {"num_cpus": 6, "num_gpus": 1})),
        ([GPU_NODE], 12, (12, {"num_cpus": 4, "num_gpus": 0.5})),
        ([{}, {"CPU": 16, "GPU": 1}], None, (1, {"num_cpus": 12, "num_gpus": 1})),
    ],
)
def test_actors_fit_on_the_nodes_and_leave_cpus(
    nodes: list[dict[str, float]], actors: int | None, placed: tuple[int, dict[str, float]]
) -> None:
    assert dataset.place(nodes, actors) == placed


@pytest.mark.parametrize("actors", [1, 2, 3, 5, 16, 64])
def test_a_local_cluster_has_cpus_for_the_actors(actors: int) -> None:
    cpus = dataset.cpus_for(actors)
    assert dataset.place([{"CPU": cpus}], actors) == (actors, {"num_cpus": 1})
    assert cpus >= actors + 2


def test_components_are_fitted_to_finite_cells() -> None:
    random = np.random.default_rng(0)
    scale = np.float32([1, 9, 3, 0.1, 0.3, 5])
    cells = [random.normal(2, 1, (pca.CELLS, 6)).astype(np.float32) * scale for _ in range(3)]
    cells[1][::7] = np.nan
    rows = [{"key": str(i), "cells": x.tobytes(), "reason": None} for i, x in enumerate(cells)]
    rows.append({"key": "bad", "cells": None, "reason": "damaged"})
    components = pca.fit(rows, 3)
    finite = np.concatenate(cells)
    finite = finite[np.isfinite(finite).all(1)]
    directions = np.linalg.svd(finite, full_matrices=False)[2][:3]  # about the origin
    np.testing.assert_allclose(np.abs((components * directions).sum(1)), 1, rtol=1e-5)
    np.testing.assert_array_equal(components, pca.fit(rows[::-1], 3))
    cells[0][:] = np.inf
    with pytest.raises(ValueError, match="needs finite features; got none from 1 images"):
        pca.fit([{**rows[0], "cells": cells[0].tobytes()}], 3)
    with pytest.raises(ValueError, match="to fit the components; damaged"):
        pca.fit(rows[-1:], 3)


def test_more_actors_than_cpus_raise() -> None:
    with pytest.raises(ValueError, match=r"--actors must be at most 2, .* got 3"):
        dataset.place([{"CPU": 4}], 3)


def test_one_process_does_not_write_to_an_output_of_ray(photos: Path, out: Path) -> None:
    data.write_settings({}, *data.filesystem(str(out)))
    assert "is an output of --engine ray" in run(*arguments(photos, out, engine=None), code=1)


# ---- on a cluster -------------------------------------------------------------------------------


@pytest.mark.slow
def test_fields_of_a_folder_equal_those_of_one_process(
    photos: Path, out: Path, tmp_path: Path, cluster: None
) -> None:
    text = extract(photos, out, code=1, rows_per_file=2, batch=2)
    assert "6 images written, 1 failed, 0 already done" in text
    assert "bad.jpg is not a readable image" in text
    run(*arguments(photos, tmp_path / "files", engine=None), code=1)
    fields = data.open(out)
    assert keys(out) == NAMES
    for name in NAMES:
        expected = load_file(tmp_path / "files" / f"{name}.safetensors")
        assert fields[name]["field"].shape == expected["field"].shape
        torch.testing.assert_close(fields[name]["field"], expected["field"])
        torch.testing.assert_close(fields[name]["prefix"], expected["prefix"])
    assert fields.errors["key"].to_pylist() == ["bad.jpg"]
    schema = pq.read_schema(next((out / "errors").iterdir()))
    assert schema.names == ["key", "reason"]
    assert not list((out / "partial").glob("*"))


@pytest.mark.slow
def test_a_second_run_computes_new_images(
    photos: Path, out: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(photos, out, code=1)
    before = {path: path.stat().st_mtime_ns for path in out.glob("data/*")}
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "_placement", None)  # Ray is not used
        text = extract(photos, out)
    assert f"nothing left to do: 6 images are in {out}, 1 failed; use --retry-failed" in text
    Image.fromarray(crops(1)[0]).save(photos / "new.png")
    assert "1 images written, 0 failed, 7 already done" in extract(photos, out)
    assert keys(out) == sorted([*NAMES, "new.png"])
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert "stride 8, now 16" in extract(photos, out, code=1, stride=16)


@pytest.mark.slow
def test_failures_are_tried_again_on_request(
    photos: Path, out: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system that pyarrow does not treat as local: files are not moved there."""
    files = PyFileSystem(FSSpecHandler(fsspec.filesystem("file")))
    monkeypatch.setattr(dataset, "filesystem", lambda place: (files, place))
    table = pa.table({"path": [*NAMES, "bad.jpg", "missing.png", "0.png"]})
    pq.write_table(table, photos / "list.parquet")
    source = photos / "list.parquet"
    assert "6 images written, 3 failed" in extract(source, out, code=1, rows_per_file=4)
    Image.fromarray(crops(1)[0]).save(photos / "bad.jpg")
    assert "nothing left to do: 6 images" in extract(source, out, rows_per_file=4)
    text = extract(source, out, code=1, rows_per_file=4, retry_failed=True)
    assert "1 images written, 2 failed, 6 already done" in text
    assert keys(out) == sorted([*NAMES, "bad.jpg"])
    assert sorted(data.open(out).errors["key"].to_pylist()) == ["0.png", "missing.png"]
    assert not (out / "partial").exists()


def write_shard(path: Path, pictures: list[np.ndarray]) -> None:
    with tarfile.open(path, "w") as archive:
        for i, pixels in enumerate(pictures):
            content = io.BytesIO()
            Image.fromarray(pixels).save(content, "png")
            for suffix, value in (("png", content.getvalue()), ("txt", f"text {i}".encode())):
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = len(value)
                archive.addfile(member, io.BytesIO(value))


@pytest.mark.slow
def test_shards_are_projected_on_one_basis(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, cluster: None
) -> None:
    (tmp_path / "shards").mkdir()
    for i in range(2):
        write_shard(tmp_path / f"shards/{i}.tar", crops(4)[2 * i : 2 * i + 2])
    shards = tmp_path / "shards"
    extract(shards, out, pca=5)
    assert keys(out) == ["0.tar/0", "0.tar/1", "1.tar/0", "1.tar/1"]
    extract(shards, tmp_path / "all", stride=8)
    extract(shards, tmp_path / "again", pca=5, actors=1)
    one = f"{tmp_path}/shards/1.tar"
    extract(one, tmp_path / "one", pca=out / "pca.npy")
    fields, whole = data.open(out), data.open(tmp_path / "all")
    components = fields.pca
    assert torch.allclose(components @ components.T, torch.eye(5), atol=1e-5)
    for again in ("again", "one"):
        assert data.open(tmp_path / again).pca.equal(components)
    for key in fields.keys.to_pylist():
        projected = torch.einsum("kc,chw->khw", components, whole[key]["field"])
        torch.testing.assert_close(fields[key]["field"], projected, atol=1e-4, rtol=1e-4)
        assert fields[key]["prefix"].equal(whole[key]["prefix"])  # all channels
        assert fields[key]["txt"] == f"text {key[-1]}"
    # They explain nearly as much of the cells as the best 5 directions.
    cells = torch.cat([whole[key]["field"].flatten(1) for key in whole.keys.to_pylist()], 1)
    best = torch.linalg.svdvals(cells)[:5].square().sum()
    assert (components @ cells).square().sum() > 0.99 * best
    assert "pca 5, now 6" in extract(shards, out, code=1, pca=6)


@pytest.mark.slow
def test_more_components_than_channels_are_an_error(photos: Path, out: Path, cluster: None) -> None:
    text = extract(photos, out, code=1, pca=64)
    assert "--pca must be between 1 and 63" in text
    assert not (out / "manifest.json").exists()


@pytest.mark.slow
def test_parquet_keeps_its_columns(photos: Path, out: Path, cluster: None) -> None:
    names = [*NAMES, "0.png", "missing.png"]
    table = pa.table({"path": [f"photos/{name}" for name in names], "label": range(8)})
    pq.write_table(table, photos.parent / "list.parquet")
    text = extract(photos.parent / "list.parquet", f"file://{out}", code=1)
    assert "6 images written, 2 failed" in text
    fields = data.open(out)
    assert fields["photos/trip/b.png"]["label"] == 5
    reasons = dict(zip(*fields.errors.to_pydict().values(), strict=True))
    assert "does not exist" in reasons["photos/missing.png"]
    assert "repeats the key" in reasons["photos/0.png"]


# ---- killed processes ---------------------------------------------------------------------------

MANY = 150


@pytest.fixture
def many(tmp_path: Path) -> Path:
    path = tmp_path / "many"
    path.mkdir()
    random = np.random.default_rng(0)
    for i in range(MANY):
        Image.fromarray(random.integers(0, 255, (48, 64, 3), np.uint8)).save(path / f"{i}.png")
    return path


def start(source: Path, out: Path) -> subprocess.Popen[str]:
    options = {"rows_per_file": 10, "batch": 5, "actors": 2}
    command = [sys.executable, "-m", "srt_ext", *map(str, arguments(source, out, **options))]
    output: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    path = {"PYTHONPATH": str(Path(srt_ext.__file__).parents[1])}
    return subprocess.Popen(command, env=os.environ | path, **output)


def wait_until(process: subprocess.Popen[str], reached: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def committed(out: Path) -> list[Path]:
    return [path for path in out.glob("checkpoint/*") if ".pending" not in path.name]


def actors_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the descendants that hold the model."""
    started = descendants(process.pid)
    return [pid for pid, name in started if name.startswith("ray::MapWorker") and "Feat" in name]


@pytest.mark.slow
@pytest.mark.serial
def test_no_image_is_lost_or_duplicated_if_a_worker_is_killed(many: Path, out: Path) -> None:
    process = start(many, out)
    wait_until(process, lambda: committed(out))
    actors = actors_of(process)
    assert len(actors) == 2
    os.kill(actors[0], signal.SIGKILL)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert keys(out) == sorted(f"{i}.png" for i in range(MANY))


@pytest.mark.slow
@pytest.mark.serial
def test_a_killed_run_is_resumed(many: Path, out: Path) -> None:
    """Only write tasks that were not committed are computed again."""
    process = start(many, out)
    wait_until(process, lambda: len(committed(out)) > 2)
    process.kill()
    process.communicate()
    assert set(keys(out)) < {f"{i}.png" for i in range(MANY)}  # readable, and not all
    done = {path.name: (out / "data" / path.name).stat().st_mtime_ns for path in committed(out)}
    process = start(many, out)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert keys(out) == sorted(f"{i}.png" for i in range(MANY))
    assert done.items() <= {p.name: p.stat().st_mtime_ns for p in out.glob("data/*")}.items()
    assert json.loads((out / "complete.json").read_text())
