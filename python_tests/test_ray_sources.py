"""Sources of a job on Ray: the files that are found, their rows, and errors as rows."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray.data")
pa = pytest.importorskip("pyarrow")
fsspec = pytest.importorskip("fsspec")

import pyarrow.parquet as pq  # noqa: E402
from PIL import Image  # noqa: E402
from ray import cloudpickle  # noqa: E402

from srt_ext.images import ImageError  # noqa: E402
from srt_ext.ray import sources, tar  # noqa: E402
from srt_ext.ray.rows import BYTES, ID, INTERNAL, SCHEMA, URI, rename  # noqa: E402
from srt_ext.ray.sources import Pictures, Source, find, read_bytes  # noqa: E402


def picture(value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), value, np.uint8)).save(file, "png")
    return file.getvalue()


def write(path: Path, data: bytes = b"data") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def shard(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def tables(source: Source, parallelism: int = 8, limit: int | None = None) -> list[Any]:
    """The tables of all read tasks, each of which is pickled, as by Ray."""
    tasks = Pictures(source).get_read_tasks(parallelism, limit)
    return [table for task in tasks for table in cloudpickle.loads(cloudpickle.dumps(task))()]


def rows(source: Source, **options: Any) -> list[dict[str, Any]]:
    """All rows with their bytes, without null values."""
    found = [read_bytes(table) for table in tables(source, **options)]
    every = [row for table in found for row in table.to_pylist()]
    assert len({row[ID] for row in every}) == len(every)
    return [{name: value for name, value in row.items() if value is not None} for row in every]


def keys(source: Source) -> list[str]:
    return [row["key"] for row in rows(source)]


def reasons(source: Source) -> dict[str, str]:
    return {row["key"]: row["reason"] for row in rows(source) if "reason" in row}


@pytest.fixture
def memory() -> Iterator[Any]:
    """A file system at memory://, which the code treats as remote."""
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/", recursive=True)


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Any]]:
    """(the name of a folder, a function that writes a file to it)."""
    if request.param == "local":
        yield str(tmp_path), lambda name, data=b"data": write(tmp_path / name, data)
        return
    files = request.getfixturevalue("memory")
    yield "memory://bucket", lambda name, data=b"data": files.pipe(f"/bucket/{name}", data)


# ---- finding files -------------------------------------------------------------------------------


def test_folder_of_images(place: tuple[str, Any]) -> None:
    """In natural order; hidden files, files of other kinds and OUT are excluded."""
    folder, put = place
    names = [
        "10.png",
        "2.JPG",
        "a b/#1 %20?.png",
        "a b/.x.png",
        ".h/1.png",
        "n.txt",
        "o/data/1.png",
    ]
    for name in names:
        put(name, name.encode())
    source = find(folder, without=f"{folder}/o")
    assert source.kind == "pictures"
    assert [(row["key"], row[BYTES]) for row in rows(source)] == [
        (name, name.encode()) for name in ("2.JPG", "10.png", "a b/#1 %20?.png")
    ]
    assert source.count() == (3, True)
    assert "hidden" in source.skipped
    assert "1 .txt" in source.skipped
    assert keys(find(folder, limit=2, without=f"{folder}/o")) == ["2.JPG", "10.png"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.png", ["2.png", "10.png"]),
        ("a/*.png", ["1.png"]),
        ("**/*.png", ["2.png", "10.png", "a/1.png", "a/b/1.png", "None/3.png"]),
        ("a/**/1.png", ["1.png", "b/1.png"]),
        ("?.png", ["2.png"]),
        ("{2..3}.p*", ["2.png"]),
        ("a/b/1.png", ["1.png"]),
    ],
)
def test_globs(place: tuple[str, Any], pattern: str, found: list[str]) -> None:
    """Keys are relative to the part of the path before the first wildcard."""
    folder, put = place
    pictures = ["10.png", "2.png", "a/1.png", "a/b/1.png", "None/3.png"]
    for name in [*pictures, "a/x.jpg", "x.parquet", "a/.h/1.png"]:
        put(name)
    assert sorted(keys(find(f"{folder}/{pattern}"))) == sorted(found)


def test_globs_are_relative_to_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b/c.png"):
        write(Path(name))
    assert keys(find("*.png")) == ["a.png"]
    assert keys(find("b")) == ["c.png"]
    assert keys(find((tmp_path / "b").as_uri())) == ["c.png"]
    assert keys(find("a.png")) == ["a.png"]


def test_a_name_that_looks_like_a_glob(tmp_path: Path) -> None:
    write(tmp_path / "a[1]/x.png")
    write(tmp_path / "a1/y.png")
    assert keys(find(f"{tmp_path}/a[1]")) == ["x.png"]
    assert keys(find(f"{tmp_path}/a[12]/*.png")) == ["a1/y.png"]


def test_numbered_shards(place: tuple[str, Any], tmp_path: Path) -> None:
    folder, put = place
    for i in (8, 9, 10, 12):
        path = shard(tmp_path / "made" / "s.tar", [("x.png", picture(i))])
        put(f"s-{i:03}.tar", path.read_bytes())
    source = find(folder + "/s-{008..011}.tar")
    assert keys(source) == [f"s-{i:03}.tar/x" for i in (8, 9, 10)]
    assert len(source.errors) == 1
    assert source.errors[0].endswith("s-011.tar does not exist")


def test_several_kinds_raise(place: tuple[str, Any]) -> None:
    folder, put = place
    for name in ("a.png", "b.tar.gz"):
        put(name)
    with pytest.raises(ValueError, match=r"has 1 images, 1 \.tar files: select one kind"):
        find(folder)
    assert find(f"{folder}/*.tar.gz").kind == "tar"


def test_a_source_without_images_raises(place: tuple[str, Any]) -> None:
    folder, put = place
    for name in ("a.txt", "b.gz", ".png"):
        put(name)
    with pytest.raises(ImageError, match=r"ignored: .*1 \.txt"):
        find(folder)
    with pytest.raises(ImageError, match=r"x\.png does not exist"):
        find(f"{folder}/x.png")


def test_fingerprint(tmp_path: Path) -> None:
    """It depends only on the files and the limit."""
    for name in ("a.png", "b.png"):
        write(tmp_path / name)
    first = find(str(tmp_path)).fingerprint()
    assert find(str(tmp_path)).fingerprint() == first
    others = [find(str(tmp_path), limit=1).fingerprint()]
    os.utime(tmp_path / "a.png", (1, 1))
    others.append(find(str(tmp_path)).fingerprint())
    write(tmp_path / "c.png")
    others.append(find(str(tmp_path)).fingerprint())
    assert len({first, *others}) == 4


# ---- bytes ---------------------------------------------------------------------------------------


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """An escaped name may equal the name, and so the key, of another file."""
    for name in (b"caf\xe9.png", b"caf\\xe9.png"):
        (tmp_path / os.fsdecode(name)).write_bytes(name)
    first, second = sorted(rows(find(str(tmp_path))), key=lambda row: "reason" in row)
    assert first["key"] == second["key"] == r"caf\xe9.png"
    assert first[BYTES] in (b"caf\xe9.png", b"caf\\xe9.png")
    assert second["reason"] == "repeats the key of image 0"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Each has a reason. A pipe is not opened, because reading it would not end."""
    for name in ("gone.png", "read.png"):
        write(tmp_path / name)
    (tmp_path / "link.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    source = find(str(tmp_path))
    (tmp_path / "gone.png").unlink()
    assert reasons(source) == {
        "gone.png": f"{tmp_path}/gone.png does not exist",
        "link.png": f"{tmp_path}/link.png does not exist",
        "pipe.png": f"{tmp_path}/pipe.png is not a regular file",
    }


def test_rows_that_need_no_bytes_are_untouched(tmp_path: Path) -> None:
    path = os.fsencode(write(tmp_path / "a", b"new"))
    table = pa.table(
        {
            ID: ["a", "b", "c"],
            "key": ["a", "b", "c"],
            URI: pa.array([path, path, path]),
            BYTES: pa.array([b"old", None, None], pa.large_binary()),
            "reason": [None, "damaged", None],
            "other": [1, 2, 3],
        }
    )
    read = read_bytes(table)
    assert read[BYTES].to_pylist() == [b"old", None, b"new"]
    assert read["reason"].to_pylist() == [None, "damaged", None]
    assert read.schema.equals(table.schema)


@pytest.mark.parametrize(("failures", "read"), [(0, True), (3, True), (4, False)])
def test_remote_errors_are_retried(
    memory: Any, monkeypatch: pytest.MonkeyPatch, failures: int, read: bool
) -> None:
    memory.pipe("/bucket/a.png", b"data")
    source, left = find("memory://bucket"), [OSError("slow down")] * failures
    opened = memory.__class__._open

    def fails(self: Any, *args: Any, **options: Any) -> Any:
        if left:
            raise left.pop()
        return opened(self, *args, **options)

    monkeypatch.setattr(memory.__class__, "_open", fails)
    monkeypatch.setattr(sources.time, "sleep", lambda _: None)
    (row,) = rows(source)
    if read:
        assert row[BYTES] == b"data"
    else:
        assert row["reason"] == "memory://bucket/a.png cannot be read: slow down"


def test_a_stream_that_fails_is_read_again(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the tables that were read before the failure."""
    made = shard(tmp_path / "s.tar", [(f"{i}.png", b"x") for i in range(300)])
    memory.pipe("/bucket/s.tar", made.read_bytes())
    source, read, left = find("memory://bucket"), sources.read_tar, [True]

    def fails(*args: Any) -> Iterator[Any]:
        for i, table in enumerate(read(*args)):
            if i == 1 and left:
                left.clear()
                raise OSError("reset")
            yield table

    monkeypatch.setattr(sources, "read_tar", fails)
    monkeypatch.setattr(sources.time, "sleep", lambda _: None)
    found = [row["key"] for table in source.file(0, {}).tables() for row in table.to_pylist()]
    assert found == [f"s.tar/{i}" for i in range(300)]
    assert not left


# ---- Parquet -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "key", "others"),
    [
        ({"key": "k", "bytes": b"data", "label": 3}, "k", {"label": 3}),
        ({"path": "p/a.png", "bytes": b"data"}, "p/a.png", {}),
        ({"path": "p/a.png", "label": "x"}, "p/a.png", {"label": "x"}),
        ({"path": "p/a.png", "key": 7}, "7", {"path": "p/a.png"}),
        ({"image": {"bytes": b"data", "path": "k"}, "height": 3}, "k", {"source_height": 3}),
        ({"image": {"bytes": None, "path": "p/a.png"}}, "p/a.png", {}),
        ({"image": b"data", "key": "k"}, "k", {}),
        ({"bytes": 4, "image": b"data", "key": "k"}, "k", {"bytes": 4}),
    ],
)
def test_parquet_columns(
    tmp_path: Path, row: dict[str, Any], key: str, others: dict[str, Any]
) -> None:
    """Paths are relative to the folder of the file."""
    write(tmp_path / "p/a.png")
    (found,) = rows(find(str(parquet(tmp_path / "x.parquet", [row]))))
    assert found["key"] == found[ID] == key
    assert found[BYTES] == b"data"
    assert {name: found[name] for name in found if name not in SCHEMA.names} == others


def test_parquet_columns_by_name(tmp_path: Path) -> None:
    row = {"bytes": b"no", "photo": b"data", "key": "no", "number": 5}
    path = str(parquet(tmp_path / "x.parquet", [row]))
    (found,) = rows(find(path, column="photo", key="number"))
    assert (found["key"], found[BYTES]) == ("5", b"data")
    assert found["source_key"] == "no"
    with pytest.raises(ValueError, match=r"images .* named nothing; got bytes, photo"):
        find(path, column="nothing")
    with pytest.raises(ValueError, match="keys named nothing; got bytes, photo"):
        find(path, key="nothing")


def test_parquet_without_a_column(tmp_path: Path) -> None:
    path = str(parquet(tmp_path / "x.parquet", [{"label": 1}]))
    with pytest.raises(ValueError, match="named bytes or path or image; got label"):
        find(path)
    path = str(parquet(tmp_path / "x.parquet", [{"bytes": b"data"}]))
    with pytest.raises(ValueError, match="named key or path; got bytes"):
        find(path)
    path = str(parquet(tmp_path / "x.parquet", [{"path": "p", "dtype": 1, "source_dtype": 1}]))
    with pytest.raises(ValueError, match="column names must be unique"):
        find(path)


def test_parquet_at_a_url(memory: Any, tmp_path: Path) -> None:
    """Relative paths are resolved against the URL of the file; others are used as they are."""
    local = write(tmp_path / "a.png", b"local")
    paths = ["p/a.png", "memory://other/a.png", str(local), local.as_uri()]
    made = parquet(tmp_path / "x.parquet", [{"path": path} for path in paths])
    memory.pipe("/bucket/d/x.parquet", made.read_bytes())
    memory.pipe("/bucket/d/p/a.png", b"relative")
    memory.pipe("/other/a.png", b"other")
    found = [row[BYTES] for row in rows(find("memory://bucket/d/x.parquet"))]
    assert found == [b"relative", b"other", b"local", b"local"]


def test_rows_of_parquet_without_an_image_or_key(tmp_path: Path) -> None:
    pictures = [b"data", None, b"data"]
    found = [{"key": key, "bytes": data} for key, data in zip("ab", pictures, strict=False)]
    parquet(tmp_path / "x.parquet", [*found, {"key": None, "bytes": b"data"}])
    assert reasons(find(str(tmp_path))) == {
        "b": "has neither bytes nor a path",
        "x.parquet, row 2": "its key is null (--key names another column)",
    }


def test_repeated_keys_of_parquet(tmp_path: Path) -> None:
    """The first row with a key is used; a limit counts repeated keys."""
    for name, names in (("1", "abca"), ("2", "dae"), ("10", "fed")):
        lines = [{"key": key, "bytes": key.encode()} for key in names]
        parquet(tmp_path / f"{name}.parquet", lines, row_group_size=2)
    found = rows(find(str(tmp_path)), parallelism=1)
    used = [row for row in found if "reason" not in row]
    assert [row["key"] for row in used] == list("abcdef")
    assert all(row[ID] == row["key"] for row in used)
    assert [(row["key"], row["reason"]) for row in found if "reason" in row] == [
        ("a", "repeats the key of 1.parquet, row 0"),
        ("a", "repeats the key of 1.parquet, row 0"),
        ("e", "repeats the key of 2.parquet, row 2"),
        ("d", "repeats the key of 2.parquet, row 0"),
    ]
    assert find(str(tmp_path)).count() == (10, True)
    limited = find(str(tmp_path), limit=5)
    assert [row["key"] for row in rows(limited)] == list("abcad")
    assert limited.count() == (5, True)


def test_equal_hashes_of_other_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(tmp_path / "x.parquet", [{"key": key, "bytes": b"data"} for key in "abca"])
    monkeypatch.setattr(sources, "hashes", lambda keys: np.zeros(len(keys), np.uint64))
    assert list(reasons(find(str(tmp_path)))) == ["a"]


def test_damaged_parquet_files(tmp_path: Path) -> None:
    """Rows before the damage are read; the file itself gets a row with a reason."""
    lines = [{"key": str(i), "bytes": os.urandom(10_000)} for i in range(20)]
    path = parquet(tmp_path / "a.parquet", lines, row_group_size=5, use_dictionary=False)
    group = pq.read_metadata(path).row_group(2).column(1)
    write(tmp_path / "b.parquet", b"PAR1 is not all of it")
    parquet(tmp_path / "c.parquet", [{"other": 1}])
    data = bytearray(path.read_bytes())
    data[group.data_page_offset : group.data_page_offset + 40] = b"\xff" * 40
    path.write_bytes(data)
    source = find(str(tmp_path))
    found = rows(source)
    assert [row["key"] for row in found if "reason" not in row] == [str(i) for i in range(10)]
    assert list(reasons(source)) == ["a.parquet", "b.parquet", "c.parquet"]
    assert "c.parquet cannot be read: it has no column bytes, key" in reasons(source)["c.parquet"]
    (tmp_path / "a.parquet").unlink()
    (tmp_path / "c.parquet").unlink()
    with pytest.raises(ImageError, match=r"b\.parquet cannot be read"):
        find(str(tmp_path))


def test_columns_of_several_parquet_files(tmp_path: Path) -> None:
    """All tables have the columns of all files, with one type per column."""
    for name, other in (("1", {"x": 1}), ("2", {"x": 1.5, "y": "a"}), ("3", {"y": None})):
        parquet(tmp_path / f"{name}.parquet", [{"key": name, "bytes": b"data", **other}])
    parquet(tmp_path / "4.parquet", [{"key": "4", "bytes": b"data", "x": "no number"}])
    found = tables(find(str(tmp_path)))
    assert [table.schema for table in found[:3]] == [
        pa.schema([*SCHEMA, ("x", pa.float64()), ("y", pa.string())])
    ] * 3
    assert "4.parquet cannot be read: Failed to parse" in found[3]["reason"][0].as_py()


def test_tables_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srt_ext.ray.parquet.TABLE_BYTES", 50_000)
    monkeypatch.setattr(tar, "TABLE_BYTES", 50_000)
    lines = [{"key": str(i), "bytes": os.urandom(10_000)} for i in range(20)]
    parquet(tmp_path / "p/x.parquet", lines)
    shard(tmp_path / "t/x.tar", [(f"{row['key']}.png", row["bytes"]) for row in lines])
    parquet(tmp_path / "q/x.parquet", [{"path": str(i)} for i in range(600)])
    for folder, most in (("p", 5), ("t", 5), ("q", 256)):
        sizes = [table.num_rows for table in tables(find(f"{tmp_path}/{folder}"))]
        assert sum(sizes) == (600 if folder == "q" else 20)
        assert most - 1 <= max(sizes) <= most


# ---- tar -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode"), [("s.tar", "w"), ("s.tgz", "w:gz"), ("s.tar.gz", "w:gz")]
)
def test_samples_of_a_shard(tmp_path: Path, name: str, mode: str) -> None:
    members = [
        ("./a.b/0.JPG", b"picture"),
        ("./a.b/0.seg.png", b"mask"),
        ("./a.b/0.txt", "café".encode()),
        ("a.b/1.json", b"{}"),
        ("a.b/1.png", b"picture"),
        ("a.b/1.txt", b"\xff"),
        ("a.b/1.key", b"ours"),
        ("a.b/._1.png", b"hidden"),
        ("README", b"no sample"),
    ]
    shard(tmp_path / "d" / name, members, mode)
    start = {BYTES: b"picture"}
    assert rows(find(str(tmp_path))) == [
        {
            ID: f"d/{name}/a.b/0",
            "key": f"d/{name}/a.b/0",
            **start,
            "seg.png": b"mask",
            "txt": "café",
        },
        {
            **{ID: f"d/{name}/a.b/1", "key": f"d/{name}/a.b/1", **start},
            **{"json": "{}", "txt": r"\xff", "source_key": b"ours"},
        },
    ]
    (table,) = tables(find(str(tmp_path)))
    assert table.schema.field("txt").type == pa.string()
    assert table.schema.field("seg.png").type == pa.large_binary()


def test_members_whose_names_are_not_utf8(tmp_path: Path) -> None:
    names = (b"caf\xe9.png", b"caf\xe9.\xe9")
    shard(tmp_path / "s.tar", [(os.fsdecode(name), b"picture") for name in names])
    assert rows(find(str(tmp_path))) == [
        {
            **{ID: r"s.tar/caf\xe9", "key": r"s.tar/caf\xe9"},
            **{BYTES: b"picture", r"\xe9": b"picture"},
        }
    ]


def test_samples_without_an_image(tmp_path: Path) -> None:
    shard(tmp_path / "s.tar", [("0.txt", b"x"), ("0.cls", b"1"), ("1.png", b"picture")])
    with tarfile.open(tmp_path / "s.tar", "a") as archive:
        link = tarfile.TarInfo("2.png")
        link.type, link.linkname = tarfile.LNKTYPE, "1.png"
        archive.addfile(link)
    assert reasons(find(str(tmp_path))) == {
        "s.tar/0": "has no image, only txt, cls",
        "s.tar/2": "2.png is not a regular file",
    }


def test_repeated_keys_of_a_shard(tmp_path: Path) -> None:
    """Two members of one name, or a sample in two places of a shard; keys include the shard."""
    names = ["0.png", "0.png", "1.png", "2.png", "1.txt"]
    shard(tmp_path / "s.tar", [(name, name.encode()) for name in names])
    shard(tmp_path / "t.tar", [("0.png", b"picture")])
    found = rows(find(str(tmp_path)))
    assert [row["key"] for row in found if "reason" not in row] == [
        f"s.tar/{i}" for i in range(3)
    ] + ["t.tar/0"]
    assert reasons(find(str(tmp_path))) == {
        "s.tar/0": "repeats the key of sample 0 of the shard; this is sample 1",
        "s.tar/1": "repeats the key of sample 2 of the shard; this is sample 4",
    }


def cut(data: bytearray, at: int) -> None:
    del data[at:]


def overwrite(data: bytearray, at: int) -> None:
    data[at : at + 512] = b"\xff" * 512


@pytest.mark.parametrize(
    ("damage", "at", "used"),
    [
        (cut, 3 * 1024 + 700, 3),  # in the content of the fourth member
        (cut, 3 * 1024 + 300, 2),  # in the header of the fourth: the third sample may be incomplete
        (cut, 3 * 1024, 3),  # between two members
        (cut, 0, 0),
        (overwrite, 3 * 1024, 2),  # a header
        (overwrite, 0, 0),
    ],
)
def test_damaged_shards(
    tmp_path: Path, damage: Callable[[bytearray, int], None], at: int, used: int
) -> None:
    """Complete samples before the damage are read, followed by a row with a reason."""
    path = shard(tmp_path / "s.tar", [(f"{i}.png", bytes(300)) for i in range(5)])
    data = bytearray(path.read_bytes())
    damage(data, at)
    path.write_bytes(data)
    *before, last = rows(find(str(tmp_path)))
    assert [row["key"] for row in before] == [f"s.tar/{i}" for i in range(used)]
    assert not any("reason" in row for row in before)
    assert last["key"] == "s.tar"
    assert f"the shard is damaged after {used} samples" in last["reason"]


def test_a_damaged_compressed_shard(tmp_path: Path) -> None:
    members = [(f"{i}.png", os.urandom(20_000)) for i in range(9)]
    path = shard(tmp_path / "s.tgz", members, "w:gz")
    for data in (path.read_bytes()[:100_000], b"no archive" * 100):
        path.write_bytes(data)
        *before, last = rows(find(str(tmp_path)))
        assert len(before) == (4 if len(data) == 100_000 else 0)
        assert "the shard is damaged" in last["reason"]


def test_a_missing_shard_is_reported(tmp_path: Path) -> None:
    for name in "ab":
        shard(tmp_path / f"{name}.tar", [("0.png", b"picture")])
    source = find(str(tmp_path))
    (tmp_path / "a.tar").unlink()
    assert reasons(source) == {"a.tar": "a.tar does not exist"}
    assert "b.tar/0" in keys(source)


def test_limit_of_shards(tmp_path: Path) -> None:
    for i in range(3):
        shard(tmp_path / f"{i}.tar", [(f"{k}.{e}", b"x") for k in range(4) for e in ("png", "cls")])
    source = find(str(tmp_path), limit=6)
    assert keys(source) == [f"0.tar/{i}" for i in range(4)] + ["1.tar/0", "1.tar/1"]
    assert source.count() == (6, True)


def test_count_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact for few shards; estimated from the sizes for many or large ones."""
    for i in range(3):
        shard(tmp_path / f"{i}.tar", [(f"{k}.png", bytes(20_000)) for k in range(40)])
    assert find(str(tmp_path)).count() == (120, True)
    monkeypatch.setattr(sources, "SCANNED", 100_000)
    count, exact = find(str(tmp_path)).count()
    assert not exact
    assert 100 <= count <= 140
    for i in range(3, 6):
        shard(tmp_path / f"{i}.tar", [(f"{k}.png", bytes(20_000)) for k in range(40)])
    monkeypatch.undo()
    assert find(str(tmp_path)).count() == (240, False)


# ---- samples and tasks ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pictures", "parquet", "paths", "tar"])
def test_sample(tmp_path: Path, kind: str) -> None:
    """It depends on the seed and not on the order of the keys."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, order in zip(folders, (range(40), range(39, -1, -1)), strict=True):
        if kind == "pictures":
            for i in order:
                write(folder / f"{i}.png", bytes([i]))
        elif kind == "tar":
            shard(folder / "s.tar", [(f"{i}.png", bytes([i])) for i in order])
        else:
            lines = [{"key": str(i), "bytes": bytes([i])} for i in order]
            for i in order:
                write(folder / f"{i}.png", bytes([i]))
            if kind == "paths":
                lines = [{"key": str(i), "path": f"{i}.png"} for i in order]
            parquet(folder / "x.parquet", lines)
    suffix = "*.parquet" if kind in ("parquet", "paths") else "*.tar" if kind == "tar" else "*.png"
    first, same = (find(f"{folder}/{suffix}").sample(10, 1) for folder in folders)
    assert first.schema.names == SCHEMA.names
    assert first["key"].to_pylist() == same["key"].to_pylist()
    assert first[BYTES].to_pylist() == same[BYTES].to_pylist()
    assert first.num_rows == len(set(first["key"].to_pylist())) == 10
    other = find(f"{folders[0]}/{suffix}").sample(10, 2)
    assert set(other["key"].to_pylist()) != set(first["key"].to_pylist())
    assert find(f"{folders[0]}/{suffix}").sample(100, 1).num_rows == 40
    assert find(f"{folders[0]}/{suffix}", limit=3).sample(100, 1).num_rows == 3


def test_sample_of_many_shards(tmp_path: Path) -> None:
    """Only a few shards are read, and as many more as a large sample needs."""
    for i in range(8):
        shard(tmp_path / f"{i}.tar", [(f"{k}.png", b"x") for k in range(10)])
    source = find(str(tmp_path))
    few = {key.split("/")[0] for key in source.sample(20, 0)["key"].to_pylist()}
    assert len(few) <= sources.SHARDS
    assert source.sample(70, 0).num_rows == 70


def test_tasks_hold_their_own_part(tmp_path: Path) -> None:
    """A million keys take megabytes; a task contains only its own part."""
    files = pa.table(
        [
            pa.array(f"{i:07}.png" for i in range(1_000_000)),
            pa.array(b"/folder/%07d.png" % i for i in range(1_000_000)),
            pa.nulls(1_000_000, pa.int64()),
            pa.nulls(1_000_000, pa.int64()),
            pa.nulls(1_000_000, pa.int64()),
        ],
        schema=find(str(write(tmp_path / "a.png"))).files.schema,
    )
    tasks = Pictures(Source("pictures", files, None, "", [])).get_read_tasks(10)
    assert len(tasks) >= 1_000_000 // sources.TASK_ROWS
    assert sum(task.metadata.num_rows for task in tasks) == 1_000_000
    assert max(len(cloudpickle.dumps(task)) for task in tasks[::50]) < 2**20
    (last,) = tasks[-1]()
    assert last["key"][-1].as_py() == "0999999.png"


def test_tasks_of_small_and_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One task per file, or per several small consecutive files; the limit is per task."""
    for i, size in enumerate([10, 10, 10, 90_000, 10, 10]):
        shard(tmp_path / f"{i}.tar", [("a.png", bytes(size)), ("b.png", b"x")])
    source = find(str(tmp_path))
    assert len(Pictures(source).get_read_tasks(100)) == 6
    assert 2 <= len(Pictures(source).get_read_tasks(3)) <= 3
    monkeypatch.setattr(sources, "TASK_BYTES", 1)
    assert len(Pictures(source).get_read_tasks(1)) == 6
    assert [table.num_rows for table in tables(source, 1, limit=1)] == [1] * 6


def test_renamed_columns() -> None:
    names = rename(["a", "field", "reason", *INTERNAL])
    assert list(names.values()) == ["a", *(f"source_{n}" for n in list(names)[1:])]
    with pytest.raises(ValueError, match="must be unique"):
        rename(["key", "source_key"])


@pytest.mark.slow
def test_ray_reads_tables_of_different_columns(tmp_path: Path) -> None:
    """The tables form one data set."""
    import ray

    shard(tmp_path / "0.tar", [("0.png", b"x"), ("0.txt", b"a")])
    shard(tmp_path / "1.tar", [("0.png", b"x"), ("0.npy", b"a"), ("1.png", b"x")])
    shard(tmp_path / "2.tar", [("0.png", b"x")]).write_bytes(b"damaged")
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    try:
        found = ray.data.read_datasource(Pictures(find(str(tmp_path))), override_num_blocks=1)
        lines = found.map_batches(read_bytes, batch_format="pyarrow", batch_size=None).take_all()
    finally:
        ray.shutdown()
    assert sorted(row["key"] for row in lines) == ["0.tar/0", "1.tar/0", "1.tar/1", "2.tar"]
    assert {(row["txt"], row["npy"]) for row in lines} == {("a", None), (None, b"a"), (None, None)}
