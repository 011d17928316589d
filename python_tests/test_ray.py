"""``srt_ext.ray.Features``: batches of encoded images against SRT, without and with Ray."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("pyarrow")

import pyarrow as pa
from cli import SMALL, crops, small_weights
from PIL import Image

from srt_ext import SRT
from srt_ext.data import FIELDS
from srt_ext.extraction import Network
from srt_ext.images import to_pixels
from srt_ext.ray import Features

SETTINGS: dict[str, Any] = {"size": 64, "views": 4, "stride": 8, "device": "cpu"}
SIZES = ((48, 64), (48, 64), (40, 56), (96, 128), (48, 64))  # (96, 128) is reduced to (48, 64)
PATCH = 8


class Patches(torch.nn.Module):
    """A model whose tokens are linear in the pixels, and that raises for white images."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.tokens = torch.nn.Conv2d(3, 5, PATCH, stride=PATCH)
        self.factor, self.error = factor, RuntimeError("out of memory")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if (images.amin((1, 2, 3)) > 0.9).any():
            raise self.error
        return self.factor * self.tokens(images).flatten(2).transpose(1, 2)


PLAIN: dict[str, Any] = {**SETTINGS, "patch": PATCH, "prefix": 0, "mean": 0, "std": 1}


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def pictures() -> list[np.ndarray]:
    return [crops(i + 1, size)[i] for i, size in enumerate(SIZES)]


def table(contents: list[bytes | None], **columns: Any) -> Any:
    return pa.table({"bytes": pa.array(contents, pa.binary()), **columns})


def field_of(row: dict[str, Any], name: str = "field") -> torch.Tensor:
    """The field [h, w, C] or prefix [n, C] of a row."""
    dtype = getattr(torch, row["dtype"])
    grid = (row["height"], row["width"], row["channels"]) if name == "field" else (-1, 64)
    return torch.frombuffer(bytearray(row[name]), dtype=dtype).reshape(grid)


def network() -> Network:
    return Network.load(SMALL, small_weights())


def alone(pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The field [h, w, C] and prefix [n, C] by SRT, without a batch."""
    net = network()
    image = net.image(to_pixels(Image.fromarray(pixels), SETTINGS["size"]))
    field, prefix = SRT(net.backbone, 4, stride=8)(image)
    return field[0].permute(1, 2, 0), prefix[0]


def assert_rows_are_those_of_srt(rows: list[dict[str, Any]], images: list[np.ndarray]) -> None:
    for row, pixels in zip(rows, images, strict=True):
        assert row["reason"] is None
        assert (row["image_height"], row["image_width"]) == pixels.shape[:2]
        assert (row["stride"], row["dtype"]) == (8, "float32")
        for name, expected in zip(("field", "prefix"), alone(pixels), strict=True):
            torch.testing.assert_close(field_of(row, name), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def features() -> Features:
    return Features(SMALL, weights=small_weights(), **SETTINGS)


# ---- fields -------------------------------------------------------------------------------------


def test_each_field_equals_that_of_srt(features: Features) -> None:
    images = pictures()
    made = features(table([encoded(p) for p in images]))
    assert made.schema == pa.schema(
        [*(field.with_nullable(True) for field in list(FIELDS)[1:]), ("reason", pa.string())]
    )
    assert_rows_are_those_of_srt(made.to_pylist(), images)


def test_a_single_image_is_bitwise_equal_to_srt(features: Features) -> None:
    pixels = pictures()[3]
    (row,) = features(table([encoded(pixels)])).to_pylist()
    for name, expected in zip(("field", "prefix"), alone(pixels), strict=True):
        assert field_of(row, name).equal(expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_fields_have_the_requested_dtype(dtype: str) -> None:
    made = Features(SMALL, weights=small_weights(), dtype=dtype, **SETTINGS)
    pixels = pictures()[0]
    (row,) = made(table([encoded(pixels)])).to_pylist()
    for name, expected in zip(("field", "prefix"), alone(pixels), strict=True):
        assert field_of(row, name).equal(expected.to(getattr(torch, dtype)))


def test_a_field_too_large_for_parquet_has_a_reason(
    features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [alone(pixels)[0].nbytes for pixels in pictures()]
    assert min(sizes) < max(sizes)
    monkeypatch.setattr("srt_ext.ray.features.LARGEST", max(sizes))
    rows = features(table([encoded(pixels) for pixels in pictures()])).to_pylist()
    for row, size in zip(rows, sizes, strict=True):
        assert (row["reason"] is None) == (size < max(sizes))
        if row["reason"]:
            assert f"smaller than 2 GiB, got a field of {size} bytes" in row["reason"]


def test_pca_projects_the_field(features: Features, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(64, 3)))[0].T.astype(np.float32)
    np.save(tmp_path / "pca.npy", basis)
    batch = table([encoded(p) for p in pictures()])
    plain = features(batch).to_pylist()
    for pca in (basis, tmp_path / "pca.npy", f"file://{tmp_path}/pca.npy"):
        made = Features(SMALL, weights=small_weights(), pca=pca, **SETTINGS)
        for row, full in zip(made(batch).to_pylist(), plain, strict=True):
            expected = field_of(full).numpy() @ basis.T
            assert row["channels"] == 3
            np.testing.assert_allclose(field_of(row), expected, rtol=1e-4, atol=1e-4)
            assert row["prefix"] == full["prefix"]
    other = Features(Patches(), pca=basis, **PLAIN)
    (reason,) = other(table([encoded(pictures()[0])]))["reason"].to_pylist()
    assert "pca must have 5 channels, like the features of the model; got 64" in reason


# ---- models -------------------------------------------------------------------------------------


def test_a_module_is_copied_and_normalised() -> None:
    model = Patches().train()
    pixels = np.full((16, 24, 3), 51, np.uint8)
    made = Features(model, **{**PLAIN, "mean": [0.1, 0.2, 0.3], "std": 0.5}, norm=True)
    assert model.training
    (row,) = made(table([encoded(pixels)])).to_pylist()
    image = (0.2 - torch.tensor([0.1, 0.2, 0.3]))[:, None, None] / 0.5
    expected = SRT(model.eval(), 4, stride=8, patch=PATCH)(image.expand(1, 3, 16, 24))
    torch.testing.assert_close(field_of(row), expected.field[0].permute(1, 2, 0))
    assert row["prefix"] is None
    default = Features(model, **{**PLAIN, "mean": None, "std": None})
    imagenet = (0.2 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    expected = default.srt(imagenet[:, None, None].expand(1, 3, 16, 24).contiguous())
    (row,) = default(table([encoded(pixels)])).to_pylist()
    torch.testing.assert_close(field_of(row), expected.field[0].permute(1, 2, 0))


def test_a_model_in_bfloat16_gets_its_dtype() -> None:
    net = network()
    made = Features(net.model.bfloat16(), **SETTINGS)
    (row,) = made(table([encoded(pictures()[0])])).to_pylist()
    assert row["reason"] is None
    assert field_of(row).equal(field_of(row).bfloat16().float())
    assert len(net.digest()) == 16


@pytest.mark.cuda
def test_fields_on_a_gpu_are_close_to_those_on_the_cpu() -> None:
    images = pictures()
    made = Features(SMALL, weights=small_weights(), **{**SETTINGS, "device": None})
    assert made.device.type == "cuda"
    for row, pixels in zip(
        made(table(list(map(encoded, images)))).to_pylist(), images, strict=True
    ):
        # Convolutions on the GPU use TF32.
        torch.testing.assert_close(field_of(row), alone(pixels)[0], rtol=1e-2, atol=1e-2)


# ---- rows without a field -----------------------------------------------------------------------


def test_rows_without_a_field_have_a_reason(features: Features) -> None:
    images = pictures()
    contents = [encoded(images[0]), encoded(images[1])[:200], None, b"", encoded(images[2]), b"x"]
    earlier = pa.array([None] * 5 + ["not read"])
    made = features(table(contents, key=list("abcdef"), n=range(6), reason=earlier))
    assert made.column_names == ["key", "n", *list(FIELDS.names)[1:], "reason"]
    rows = made.to_pylist()
    assert [row["n"] for row in rows] == list(range(6))
    assert_rows_are_those_of_srt([rows[0], rows[4]], [images[0], images[2]])
    failed = [rows[i] for i in (1, 2, 3, 5)]
    for row in failed:
        assert {row[name] for name in FIELDS.names if name != "key"} == {None}
    reasons = [row["reason"] for row in failed]
    assert reasons[0].startswith("b is not a readable image: ")
    assert reasons[1:] == [
        "c has no bytes",
        "d is not a readable image: cannot identify image file",
        "not read",
    ]


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ({"__key__": ["shard/1"], "path": ["x"]}, "shard/1"),
        ({"path": ["a\nb.png"]}, "a\\nb.png"),
        ({"key": [None]}, "row 0"),
        ({}, "row 0"),
    ],
)
def test_reasons_name_the_image(features: Features, columns: Any, name: str) -> None:
    (row,) = features(table([b"damaged"], **columns)).to_pylist()
    assert row["reason"].startswith(f"{name} is not a readable image")


def test_an_image_that_fails_does_not_fail_its_group() -> None:
    images = [p for p in pictures() if p.shape[:2] == (48, 64)]
    images.insert(1, np.full((48, 64, 3), 255, np.uint8))
    made = Features(Patches(), **PLAIN)
    rows = made(table([encoded(p) for p in images])).to_pylist()
    assert rows[1]["reason"].startswith("row 1: not enough memory (out of memory): use a smaller")
    assert rows[1]["field"] is None
    for i in (0, 2, 3):
        (row,) = made(table([encoded(images[i])])).to_pylist()
        assert rows[i] == row


def test_values_beyond_float16_give_a_reason() -> None:
    images = [np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 200, np.uint8)]
    made = Features(Patches(factor=1e6), dtype="float16", **PLAIN)
    made.network.model.tokens.bias.data.zero_()
    rows = made(table([encoded(p) for p in images])).to_pylist()
    assert rows[0]["reason"] is None
    assert rows[1]["reason"].startswith("row 1: field must be at most 65504")
    assert rows[1]["reason"].endswith("use dtype bfloat16")


def test_an_error_of_the_device_ends_the_job() -> None:
    model = Patches()
    model.error = torch.AcceleratorError("CUDA error: unspecified launch failure")
    made = Features(model, **PLAIN)
    with pytest.raises(torch.AcceleratorError, match="launch failure"):
        made(table([encoded(np.full((16, 16, 3), 255, np.uint8))]))


# ---- batches and arguments ----------------------------------------------------------------------


def test_columns_with_our_names_are_renamed(features: Features) -> None:
    columns = {"height": [7], "source_height": [8], "field": ["corn"]}
    (row,) = features(table([encoded(pictures()[0])], **columns)).to_pylist()
    assert (row["source_height"], row["source_source_height"]) == (7, 8)
    assert row["source_field"] == "corn"
    assert row["height"] == 6


def test_empty_batches_have_all_columns(features: Features) -> None:
    full = features(table([None], n=[1]))
    assert features(table([None], n=[1]).slice(0, 0)).schema == full.schema
    assert features(pa.table({})).num_rows == 0
    untyped = features(pa.table({"bytes": pa.nulls(2), "reason": pa.nulls(2)}))
    assert untyped["reason"].to_pylist() == ["row 0 has no bytes", "row 1 has no bytes"]


def test_a_dict_of_arrays_is_a_batch(features: Features) -> None:
    contents = [encoded(pictures()[0]), None]
    arrays = {"bytes": np.array(contents, object), "n": np.arange(2)}
    assert features(arrays).equals(features(table(contents, n=np.arange(2))))


@pytest.mark.parametrize(
    ("batch", "kind", "rule"),
    [
        ([b""], TypeError, "the batch must be a pyarrow.Table or a dict of arrays"),
        ({"jpg": np.array([b""], object)}, ValueError, r"column 'bytes'; got \['jpg'\]"),
        ({"bytes": np.array(["a.png"])}, TypeError, "column 'bytes' must be binary; got string"),
    ],
)
def test_wrong_batches_raise(features: Features, batch: Any, kind: Any, rule: str) -> None:
    with pytest.raises(kind, match=rule):
        features(batch)


@pytest.mark.parametrize(
    ("arguments", "kind", "rule"),
    [
        ({"model": print}, TypeError, "model must be a name or a torch.nn.Module; got builtin"),
        ({"layers": [1, 2]}, ValueError, "layers must be omitted"),
        ({"inject": 1}, ValueError, "inject must be omitted"),
        ({"layer": [1]}, TypeError, r"layer must be one index or module name; got \[1\]"),
        ({"stride": (4, 8)}, TypeError, r"stride must be an integer >= 1, for both axes; got"),
        ({"size": -1}, ValueError, "size must be an integer >= 0; got -1"),
        ({"dtype": "float64"}, ValueError, "dtype must be one of .*; got 'float64'"),
        ({"model": Patches(), "weights": "x"}, ValueError, "weights must be omitted for a module"),
        ({"mean": 0, "std": 1}, ValueError, "must be omitted for a model by name.*mean and std"),
        ({"model": Patches(), "mean": 0}, ValueError, "must be given together; got only mean"),
        ({"model": Patches(), "mean": 0, "std": 0}, ValueError, "std > 0; got"),
        ({"model": Patches(), "mean": [0, 0], "std": 1}, ValueError, "must be 1 or 3 finite"),
        ({"model": Patches()}, ValueError, "SRT: patch must be given"),
        ({"pca": np.zeros(3)}, ValueError, r"pca must be components \[K, C\]; got \[3\]"),
        ({"reduce": "sum"}, ValueError, "reduce must be one of"),
    ],
)
def test_wrong_arguments_raise(arguments: dict[str, Any], kind: Any, rule: str) -> None:
    with pytest.raises(kind, match=rule):
        Features(**{"model": "small", **arguments})


# ---- Ray ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=4, num_gpus=0, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("batch_format", ["default", "pyarrow"])
def test_files_on_two_actors(cluster: Any, batch_format: str, tmp_path: Path) -> None:
    images = pictures()
    for i, pixels in enumerate(images):
        (tmp_path / f"{i}.png").write_bytes(encoded(pixels))
    (tmp_path / "damaged.jpg").write_bytes(encoded(images[0], "JPEG")[:300])
    rows = (
        cluster.data.read_binary_files(str(tmp_path), include_paths=True)
        .map_batches(
            Features,
            fn_constructor_args=[network().model],  # the actors load no weights
            fn_constructor_kwargs={**SETTINGS, "mean": 0.5, "std": 0.5},
            batch_size=4,
            batch_format=batch_format,
            concurrency=2,
        )
        .take_all()
    )
    rows.sort(key=lambda row: row["path"])
    assert [Path(row["path"]).name for row in rows] == [f"{i}.png" for i in range(5)] + [
        "damaged.jpg"
    ]
    assert_rows_are_those_of_srt(rows[:5], images)
    assert "damaged.jpg is not a readable image" in rows[5]["reason"]


@pytest.mark.slow
def test_samples_with_tensors_and_objects(cluster: Any) -> None:
    images = pictures()
    samples = [
        {
            "__key__": f"{i:04}",
            "jpg": encoded(pixels),
            "depth.npy": np.full((2, 3, 4), i, np.float32),
            "json": {"label": i},
            "height": 1000 + i,
        }
        for i, pixels in enumerate(images)
    ]
    made = cluster.data.from_items(samples).map_batches(
        Features,
        fn_constructor_args=[SMALL],
        fn_constructor_kwargs={**SETTINGS, "weights": small_weights(), "column": "jpg"},
        batch_size=3,
        concurrency=1,
    )
    rows = sorted(made.take_all(), key=lambda row: row["__key__"])
    assert_rows_are_those_of_srt(rows, images)
    for i, row in enumerate(rows):
        assert row["source_height"] == 1000 + i
        assert row["json"] == {"label": i}
        assert row["depth.npy"].shape == (2, 3, 4)
        assert (row["depth.npy"] == i).all()
        assert "jpg" not in row
