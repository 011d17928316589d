"""srt_ext.data: writing and reading the files of a data set of fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from process import run_python
from torch.utils.data import DataLoader

pytest.importorskip("ml_dtypes")  # NumPy then knows bfloat16
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
data = pytest.importorskip("srt_ext.data")

DTYPES = ["float32", "float16", "bfloat16"]
CHANNELS = 4  # of the features of the model
Many = tuple[Path, list[dict[str, Any]]]

# Reads OUT without srt_ext.
PLAIN = """
from pathlib import Path
import numpy as np
import pyarrow.parquet as pq

for path in sorted(Path(out, "data").glob("*.parquet")):
    file = pq.ParquetFile(path)
    for group in range(file.num_row_groups):
        for row in file.read_row_group(group).to_pylist():
            shape = row["height"], row["width"], row["channels"]
            field = np.frombuffer(row["field"], row["dtype"]).reshape(shape)
            use(row["key"], field)
"""


def make_row(
    i: int, dtype: str = "float32", prefix: int = 1, channels: int = CHANNELS
) -> dict[str, Any]:
    """The row of image i: random features of a size that depends on i, and a label."""
    random, shape = np.random.default_rng(i), (2 + i % 3, 1 + i % 4, channels)
    values = {
        "field": random.standard_normal(shape).astype(dtype).tobytes(),
        "prefix": random.standard_normal((prefix, CHANNELS)).astype(dtype).tobytes() or None,
    }
    numbers = {"height": shape[0], "width": shape[1], "channels": channels, "stride": 8}
    image = {"image_height": 16 * shape[0] + 1, "image_width": 16 * shape[1]}
    return {"label": i, "key": f"{i % 7}/{i}", "dtype": dtype, **numbers, **image, **values}


def write(out: str | Path, files: dict[str, list[dict[str, Any]]]) -> None:
    """Writes an output with these files in data/."""
    place, path = data.filesystem(str(out))
    data.write_settings({"model": "small"}, place, path)
    place.create_dir(f"{path}/data")
    for name, rows in files.items():
        with place.open_output_stream(f"{path}/data/{name}") as file:
            data.write_rows(pa.Table.from_pylist(rows), file)


def expected(row: dict[str, Any], name: str = "field") -> np.ndarray:
    """[C, H', W'] or [n, C], float32."""
    shape = (row["height"], row["width"], row["channels"]) if name == "field" else (-1, CHANNELS)
    values = np.frombuffer(row[name], row["dtype"]).reshape(shape).astype(np.float32)
    return values.transpose(2, 0, 1) if name == "field" else values


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Many:
    """40 images in three files, a few images per row group; and their rows in order."""
    monkeypatch.setattr(data, "ROW_GROUP_BYTES", 600)
    rows = [make_row(i) for i in range(40)]
    write(tmp_path, {"b.parquet": rows[15:37], "c.parquet": rows[37:], "a.parquet": rows[:15]})
    return tmp_path, rows


@pytest.fixture
def read_groups(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[str]]]:
    """A list that records each row group that is read, and its columns."""
    calls = []
    read = pq.ParquetFile.read_row_group

    def count(self: Any, group: int, columns: list[str]) -> Any:
        calls.append((group, columns))
        return read(self, group, columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", count)
    return calls


# ---- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [1, 7])
def test_row_groups_are_as_large_as_the_limit_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunks: int
) -> None:
    monkeypatch.setattr(data, "ROW_GROUP_BYTES", 1000)
    random = np.random.default_rng(0)
    sizes = random.integers(1, 400, (60, 2))
    sizes[[20, 59]] = 5000  # each larger than the limit
    rows = [
        make_row(i) | {"field": bytes(int(f)), "prefix": bytes(int(p)) if i % 5 else None}
        for i, (f, p) in enumerate(sizes)
    ]
    parts = np.array_split(np.arange(60), chunks)
    table = pa.concat_tables([pa.Table.from_pylist([rows[i] for i in part]) for part in parts])
    data.write_rows(table, tmp_path / "a.parquet")

    file, first = pq.ParquetFile(tmp_path / "a.parquet"), 0
    taken = [len(row["field"]) + len(row["prefix"] or b"") for row in rows]
    for group in range(file.num_row_groups):
        end = first + file.metadata.row_group(group).num_rows
        assert sum(taken[first:end]) <= 1000 or end == first + 1
        assert end == 60 or sum(taken[first : end + 1]) > 1000
        assert file.read_row_group(group).to_pylist() == [
            {name: row[name] for name in (*data.NAMES, "label")} for row in rows[first:end]
        ]
        first = end
    assert first == 60


def test_columns_of_a_file(tmp_path: Path) -> None:
    row = {"tags": ["x", "y"], **make_row(0), "name": "n"}
    data.write_rows(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    file = pq.ParquetFile(tmp_path / "a.parquet")
    assert file.schema_arrow.names == [*data.NAMES, "tags", "label", "name"]
    assert pa.schema(list(file.schema_arrow)[: len(data.NAMES)]).equals(data.FIELDS)
    group = file.metadata.row_group(0)
    for i in range(group.num_columns):
        column = group.column(i)
        blob = column.path_in_schema in ("field", "prefix")
        assert column.compression == ("UNCOMPRESSED" if blob else "ZSTD")
        assert blob != column.has_dictionary_page
        assert blob != column.is_stats_set


@pytest.mark.parametrize("name", ["key", "height", "field"])
def test_wrong_rows_raise(tmp_path: Path, name: str) -> None:
    table = pa.Table.from_pylist([make_row(0), make_row(1) | {name: None}])
    with pytest.raises(ValueError, match=rf"'{name}'.* null|null.*{name}"):
        data.write_rows(table, tmp_path / "a.parquet")


def test_manifest(tmp_path: Path) -> None:
    files, out = data.filesystem(str(tmp_path / "new"))
    assert data.read_settings(files, out) is None
    first = {"model": "before"}
    data.write_settings(first, files, out)
    with (tmp_path / "new/manifest.json").open() as before:
        second = {"model": "after"}
        data.write_settings(second, files, out)
        assert data.read_settings(files, out) == second
        assert "before" in before.read()  # the file was replaced, not changed
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["manifest.json"]
    (tmp_path / "new/manifest.json").write_text('{"format": 2}')
    with pytest.raises(ValueError, match="must have format 1"):
        data.read_settings(files, out)


# ---- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_round_trip(tmp_path: Path, dtype: str, prefix: int) -> None:
    rows = [make_row(i, dtype, prefix) for i in range(4)]
    write(tmp_path, {"a.parquet": rows})
    for row, picture in zip(rows, data.open(tmp_path), strict=True):
        field = picture["field"]
        assert field.dtype == getattr(torch, dtype)
        assert field.permute(1, 2, 0).is_contiguous()  # channels last
        np.testing.assert_array_equal(field.float(), expected(row))
        field += 1  # memory of its own
        if prefix:
            assert picture["prefix"].dtype == field.dtype
            np.testing.assert_array_equal(picture["prefix"].float(), expected(row, "prefix"))
        else:
            assert "prefix" not in picture
        for name in ("key", "stride", "image_height", "image_width", "label"):
            assert picture[name] == row[name]


def test_a_projected_field_has_a_prefix_of_the_model(tmp_path: Path) -> None:
    row = make_row(3, channels=2)
    write(tmp_path, {"a.parquet": [row]})
    data.write_settings({"pca": "2"}, *data.filesystem(str(tmp_path)))
    basis = np.eye(2, CHANNELS, dtype=np.float32)
    np.save(tmp_path / "pca.npy", basis)
    fields = data.open(tmp_path)
    assert fields[0]["field"].shape == (2, row["height"], row["width"])
    np.testing.assert_array_equal(fields[0]["prefix"], expected(row, "prefix"))
    np.testing.assert_array_equal(fields.pca, basis)


def test_access_by_index_and_key(many: Many) -> None:
    out, rows = many
    fields = data.open(str(out))
    assert len(fields) == 40
    assert fields.settings == {"model": "small"}
    assert fields.pca is None
    assert fields.keys.to_pylist() == [row["key"] for row in rows]
    for i in np.random.default_rng(0).permutation(40):
        for index in (i, int(i) - 40, torch.tensor(i), rows[i]["key"]):
            picture = fields[index]
            assert picture["label"] == i
            np.testing.assert_array_equal(picture["field"], expected(rows[i]))


def test_iterating_reads_each_row_group_once(
    many: Many, read_groups: list[tuple[int, list[str]]]
) -> None:
    fields = data.open(many[0])
    assert not read_groups
    assert [picture["label"] for picture in fields] == list(range(40))
    assert len(read_groups) == len(fields.row_groups) - 1 > 10
    read_groups.clear()
    order = [
        i
        for group in np.random.default_rng(0).permutation(len(fields.row_groups) - 1)
        for i in range(fields.row_groups[group], fields.row_groups[group + 1])
    ]
    loader = DataLoader(fields, sampler=order, batch_size=None)
    assert [picture["label"] for picture in loader] == order
    assert len(read_groups) == len(fields.row_groups) - 1


def test_kept_images_do_not_hold_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "ROW_GROUP_BYTES", 2**20)
    wide = {"height": 256, "width": 256, "channels": 1, "field": bytes(2**18)}
    write(tmp_path, {"a.parquet": [make_row(i) | wide for i in range(40)]})
    fields, kept = data.open(tmp_path), []  # of ten row groups
    before = pa.total_allocated_bytes()
    for picture in fields:
        kept.append(picture)
        assert pa.total_allocated_bytes() - before < 3 * 2**20


@pytest.mark.parametrize(("start", "workers"), [("fork", 2), ("spawn", 1)])
def test_loader_with_workers(many: Many, start: str, workers: int) -> None:
    out, rows = many
    fields = data.open(out, ["field", "label"])
    first = fields[0]["field"]  # loads a row group that a worker could inherit
    seeded = torch.Generator().manual_seed(0)
    processes = {"num_workers": workers, "multiprocessing_context": start}
    loader = DataLoader(fields, None, shuffle=True, generator=seeded, **processes)
    labels = []
    for picture in loader:
        labels.append(picture["label"])
        np.testing.assert_array_equal(picture["field"], expected(rows[labels[-1]]))
    assert sorted(labels) == list(range(40)) != labels
    np.testing.assert_array_equal(first, expected(rows[0]))


def test_batches_of_one_size(tmp_path: Path) -> None:
    write(tmp_path, {"a.parquet": [make_row(12 * i) for i in range(6)]})
    batch = next(iter(DataLoader(data.open(tmp_path), batch_size=6)))
    assert batch["field"].shape == (6, CHANNELS, 2, 1)
    assert batch["label"].tolist() == [0, 12, 24, 36, 48, 60]
    assert len(batch["key"]) == 6


def test_columns(tmp_path: Path, read_groups: list[tuple[int, list[str]]]) -> None:
    other = {name: value for name, value in make_row(1).items() if name != "label"}
    write(tmp_path, {"a.parquet": [make_row(0)], "b.parquet": [other | {"tags": ["x"]}]})
    assert data.open(tmp_path).columns == ["field", "prefix", "label", "tags"]
    values = [(p["label"], p["tags"]) for p in data.open(tmp_path)]
    assert values == [(0, None), (None, ["x"])]
    numbers = {"key", "stride", "image_height", "image_width"}
    for columns in ([], ["prefix"], ["tags", "field"]):
        read_groups.clear()
        for picture in data.open(tmp_path, columns):
            assert set(picture) == numbers | set(columns)
        unread = {"field", "prefix", "label", "tags"} - set(columns)
        assert not unread & {name for _, names in read_groups for name in names}


def test_open_reads_only_the_keys(tmp_path: Path) -> None:
    write(tmp_path, {"a.parquet": [make_row(i) for i in range(9)]})
    path = tmp_path / "data/a.parquet"
    group, content = pq.read_metadata(path).row_group(0), bytearray(path.read_bytes())
    for i in range(1, group.num_columns):  # all but the keys
        column = group.column(i)
        start = column.dictionary_page_offset or column.data_page_offset
        content[start : start + column.total_compressed_size] = b"\xff" * (
            column.total_compressed_size
        )
    path.write_bytes(content)
    fields = data.open(tmp_path)
    assert fields.keys.to_pylist() == [make_row(i)["key"] for i in range(9)]
    with pytest.raises(OSError, match="deserialize"):
        fields[0]


def test_plain_pyarrow_reads_the_fields(tmp_path: Path) -> None:
    rows = [make_row(i, DTYPES[i % 3]) for i in range(12)]
    write(tmp_path, {"a.parquet": rows[:6], "b.parquet": rows[6:]})
    found: list[tuple[str, np.ndarray]] = []
    exec(PLAIN, {"out": tmp_path, "use": lambda *pair: found.append(pair)})
    for row, (key, field) in zip(rows, found, strict=True):
        assert key == row["key"]
        np.testing.assert_array_equal(field.astype(np.float32).transpose(2, 0, 1), expected(row))


# ---- outputs of a job ---------------------------------------------------------------------------


def write_errors(out: Path, name: str, keys: list[str]) -> None:
    (out / "errors").mkdir(exist_ok=True)
    table = pa.table({"key": keys, "reason": ["damaged"] * len(keys), "label": [1] * len(keys)})
    pq.write_table(table, out / "errors" / name)


def test_files_without_a_checkpoint_are_ignored(
    many: Many,
) -> None:
    out, rows = many
    for name in ("a.parquet", "b.parquet"):
        write_errors(out, name, [f"{name}/{i}" for i in range(2)])
    assert data.open(out).errors.num_rows == 4
    (out / "checkpoint").mkdir()
    with pytest.raises(ValueError, match="must have at least one image"):
        data.open(out)
    for name in ("b.parquet", "c.pending.parquet", "d.parquet"):
        (out / "checkpoint" / name).touch()
    fields = data.open(out)
    assert [picture["label"] for picture in fields] == list(range(15, 37))
    assert fields.errors.to_pylist() == [
        {"key": f"b.parquet/{i}", "reason": "damaged"} for i in range(2)
    ]
    with pytest.raises(KeyError, match=r"must be the key of an image; got '0/0'"):
        fields[rows[0]["key"]]


def test_errors_are_empty_without_failed_images(many: Many) -> None:
    errors = data.open(many[0]).errors
    assert errors.num_rows == 0
    assert errors.column_names == ["key", "reason"]


def test_an_output_at_an_fsspec_url() -> None:
    pytest.importorskip("fsspec")
    rows = [make_row(i) for i in range(5)]
    write("memory://test/fields", {"a.parquet": rows[3:], "0.parquet": rows[:3]})
    fields = data.open("memory://test/fields")
    assert [picture["label"] for picture in fields] == [0, 1, 2, 3, 4]
    assert fields["4/4"]["label"] == 4
    assert fields.errors.num_rows == 0


# ---- errors -------------------------------------------------------------------------------------


def test_wrong_outputs_raise(tmp_path: Path) -> None:
    for out in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=rf"with a manifest.json; got {out}$"):
            data.open(out)
    write(tmp_path, {})
    with pytest.raises(ValueError, match="must have at least one image; got none in"):
        data.open(tmp_path)
    with pytest.raises(TypeError, match="out must be a path or a URL; got 3"):
        data.open(3)
    (tmp_path / "data/a.parquet").write_bytes(b"PAR1 is cut here")
    with pytest.raises(ValueError, match=r"data/a\.parquet is damaged"):
        data.open(tmp_path)


def test_wrong_arguments_raise(many: Many) -> None:
    fields = data.open(many[0])
    for index in (40, -41):
        with pytest.raises(IndexError, match=rf"must be in -40 \.\. 39; got {index}"):
            fields[index]
    for key in ("", "9/9", "zzz"):
        with pytest.raises(KeyError, match=f"must be the key of an image; got '{key}'"):
            fields[key]
    for wrong in (1.0, None, True, slice(2)):
        with pytest.raises(TypeError, match="index must be an integer or a key"):
            fields[wrong]
    for columns in ("label", ["labels"], ["key"]):
        with pytest.raises(ValueError, match=r"names from \['field', 'prefix', 'label'\]; got"):
            data.open(many[0], columns)


def test_filesystem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    local = {"a:b/c": "a:b/c", "a/../b": "b", "file://" + str(tmp_path / "a%20b"): "a b"}
    for url, path in local.items():
        files, found = data.filesystem(url)
        assert isinstance(files, pa.fs.LocalFileSystem)
        assert found == str(tmp_path / path)
    with pytest.raises(ValueError, match=r"Unsupported hostname.*; got file://a/b$"):
        data.filesystem("file://a/b")


def test_unknown_url_schemes_raise() -> None:
    fsspec = pytest.importorskip("fsspec")
    with pytest.raises(ValueError, match=r"Protocol not known: nonsense\); got nonsense://a$"):
        data.filesystem("nonsense://a")
    missing = "missing_package.FileSystem"
    fsspec.register_implementation("needy", missing, errtxt="Install missing_package")
    with pytest.raises(ValueError, match=r"Install missing_package\); got needy://a$"):
        data.filesystem("needy://a")


def test_import_of_the_package_needs_no_pyarrow() -> None:
    run_python("-c", "import srt_ext, sys; assert 'pyarrow' not in sys.modules")
