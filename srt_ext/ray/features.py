"""The features of a batch of encoded images: the step of a Ray data set that runs the model."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from .._messages import describe, is_out_of_memory, one_line
from .._validation import check_count, is_integer, wrong
from ..backbones import Layer
from ..data import FIELDS, filesystem, read_components
from ..extraction import Network, cast
from ..images import ImageError, decode_image, quiet_decoders, to_pixels
from ..srt import SRT

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std
LARGEST = 2**31  # bytes of one value, here a field
_WHERE = "Features"
_KEYS = ("key", "__key__", "path")  # columns that name an image; the first existing one is used
_MODEL_SETTINGS = ("norm", "patch", "prefix")  # of SRT
_MADE = FIELDS.remove(FIELDS.get_field_index("key"))


class Features:
    """Decodes images, runs :class:`srt_ext.SRT`, and returns one field for each image.

    A callable for ``map_batches`` of a Ray data set; each actor creates one, which holds the model.
    The class does not need Ray. Images of one size are processed in one batch.

    Method: Lao et al., "Sub-token ViT Embedding via Stochastic Resonance Transformers", ICML 2024.

    Args:
        model: a name, as for ``srt-ext features --model``: a model of timm, ``local-dir:FOLDER``,
            ``hf-hub:OWNER/NAME`` or ``small``. Or a ``torch.nn.Module``, which is copied and put in
            eval mode; Ray sends it to all actors, so that only the driver needs its weights.
        weights: a .safetensors state dict for a model by name. None: the pretrained weights.
        layer: index of a block or stage, or, with ``patch``, the name of a module. None: the last
            layer.
        size: images whose longer side has more pixels are reduced to this size; 0: never.
        dtype: of the field and the prefix: ``float32``, ``float16`` or ``bfloat16``.
        mean, std: normalisation for a module, one number or one per channel, for pixels in 0 .. 1.
            None: the values of ImageNet. Omit them for a model by name.
        pca: components [K, C], or the path or URL of a .npy file of them in float32. The field is
            projected to components @ x in every cell; the prefix is not projected.
        column: name of the column with the encoded images (JPEG, PNG, ...).
        device: None: ``cuda`` if available, otherwise ``cpu``. Ray hides the GPUs from actors
            without ``num_gpus``.
        settings: arguments of :class:`srt_ext.SRT`, such as ``quality``, ``views``, ``scale``,
            ``stride`` (one integer), ``view_batch``, ``reduce``; not ``layers`` or ``inject``.

    Calling it with a batch, a ``pyarrow.Table`` or a dict of NumPy arrays, returns a table with the
    same rows. ``column`` is dropped; all other columns are kept, and renamed to ``source_NAME`` if
    they have the name of one of these new columns:

    - ``height``, ``width``: cells of the field.
    - ``stride``: pixels per cell, of the image after ``size`` and before ``scale``.
    - ``channels``: channels of the field: C, or K with ``pca``.
    - ``dtype``: as the argument.
    - ``field``: bytes in C order, [height, width, channels].
    - ``prefix``: bytes in C order, [n, C], class and register tokens; null without them.
    - ``image_height``, ``image_width``: pixels of the upright image, before ``size``.
    - ``reason``: null, or the reason why the image has no field, as one line; the other new columns
      are then null.

    A row gets a reason if its bytes are null or not a readable image, or if memory is insufficient.
    If the images of one size fail together, each is tried alone. A row that already has a reason (a
    string in the column ``reason`` of the batch) is not processed. Reasons name images by the
    column ``key``, ``__key__`` or ``path``, otherwise by their row.

    Raises:
        TypeError, ValueError: an argument is invalid, as for SRT; a batch has no ``column``, or the
            column does not contain bytes.
        srt_ext.hub.ModelError: the model by name cannot be loaded.
        torch.AcceleratorError: an error of CUDA, after which all other images would fail, too.

    Example:
        >>> import numpy as np, pyarrow as pa
        >>> from srt_ext.demo.quality import PHOTO
        >>> features = Features("small", size=96, views=4, stride=8, device="cpu")
        >>> images = pa.array([PHOTO.read_bytes(), b"damaged"])
        >>> table = features(pa.table({"key": ["astronaut.jpg", "b.jpg"], "bytes": images}))
        >>> row, other = table.to_pylist()
        >>> shape = row["height"], row["width"], row["channels"]
        >>> field = np.frombuffer(row["field"], row["dtype"]).reshape(shape)
        >>> field.shape, row["reason"]
        ((12, 12, 128), None)
        >>> other["reason"][:29]
        'b.jpg is not a readable image'

    On Ray, here with two actors and a GPU for each::

        import ray
        from srt_ext.ray import Features

        images = ray.data.read_binary_files("s3://bucket/photos", include_paths=True)
        settings = {"model": "vit_small_patch14_dinov2.lvd142m", "dtype": "float16", "stride": 4}
        images.map_batches(
            Features,
            fn_constructor_kwargs=settings,
            batch_size=16,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=2),
            num_cpus=8,
            num_gpus=1,
        ).write_parquet("s3://bucket/features")
    """

    def __init__(
        self,
        model: str | nn.Module,
        *,
        weights: str | os.PathLike[str] | None = None,
        layer: Layer | None = None,
        size: int = 448,
        dtype: str = "float32",
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        pca: np.ndarray | str | os.PathLike[str] | None = None,
        column: str = "bytes",
        device: str | torch.device | None = None,
        **settings: Any,
    ) -> None:
        for name in ("layers", "inject"):
            if settings.pop(name, None) is not None:
                rule = f"{name} must be omitted, because Features returns the field of one layer"
                raise wrong(ValueError, _WHERE, rule, name)
        if layer is not None and not isinstance(layer, str) and not is_integer(layer):
            raise wrong(TypeError, _WHERE, "layer must be one index or module name", repr(layer))
        if dtype not in DTYPES:
            rule = f"dtype must be one of {', '.join(DTYPES)}"
            raise wrong(ValueError, _WHERE, rule, repr(dtype))
        stride = settings.pop("stride", 1)
        self.stride = check_count(_WHERE, "stride", stride, 1, other=", for both axes")
        self.size = check_count(_WHERE, "size", size, 0)
        self.dtype, self.column = dtype, column
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._components = None if pca is None else _components(pca).to(self.device)
        known = {name: settings.pop(name) for name in _MODEL_SETTINGS if name in settings}
        self.network = _network(model, weights, mean, std, layer, known)
        self.network.model.to(self.device)
        self.srt = SRT(self.network.backbone, stride=self.stride, **settings)

    def __call__(self, batch: pa.Table | Mapping[str, np.ndarray]) -> pa.Table:
        table = _table(batch)
        rows = _rows(table)
        # Ray sets torch's number of threads to num_cpus of the actor. Decoders release the GIL.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool, quiet_decoders():
            decoded = list(pool.map(self._decode, rows, self._contents(table)))
        by_size: dict[tuple[int, ...], list[_Picture]] = {}
        for row, pixels in zip(rows, decoded, strict=True):
            if pixels is not None:
                by_size.setdefault(pixels.shape, []).append((row, pixels))
        for pictures in by_size.values():
            reason = self._extract(pictures)
            for row, pixels in pictures if reason else []:
                row["reason"] = self._extract([(row, pixels)]) if len(pictures) > 1 else reason
        return _joined(table, rows, self.column)

    def _contents(self, table: pa.Table) -> list[bytes | None]:
        if not table.num_rows:  # Ray's empty batches may have no columns
            return []
        if self.column not in table.column_names:
            rule = f"the batch must have a column {self.column!r}"
            raise wrong(ValueError, _WHERE, rule, table.column_names)
        contents: list[Any] = table[self.column].to_pylist()
        if not all(content is None or isinstance(content, bytes) for content in contents):
            rule = f"the column {self.column!r} must be binary"
            raise wrong(TypeError, _WHERE, rule, table[self.column].type)
        return contents

    def _decode(self, row: _Row, content: bytes | None) -> np.ndarray | None:
        """[H, W, 3] uint8; None if decoding fails, with the reason in ``row``."""
        if row["reason"] is not None:
            return None
        try:
            if content is None:
                raise ImageError(f"{row['name']} has no bytes")
            image = decode_image(io.BytesIO(content), row["name"])
            row["image_width"], row["image_height"] = image.size
            return to_pixels(image, self.size)
        except Exception as error:
            row["reason"] = _reason(row["name"], error)
            return None

    def _extract(self, pictures: list[_Picture]) -> str | None:
        """Fills the rows of images of one size. Returns the reason if this fails."""
        try:
            fields, prefixes = self._run([pixels for _, pixels in pictures])
        except Exception as error:
            if isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error):
                raise
            return _reason(pictures[0][0]["name"], error)
        height, width, channels = fields.shape[1:]
        for i, (row, _) in enumerate(pictures):
            row |= {"height": height, "width": width, "channels": channels}
            row |= {"stride": self.stride, "dtype": self.dtype, "field": fields[i]}
            row["prefix"] = None if prefixes is None else prefixes[i]
        return None

    def _run(self, pixels: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """B images [H, W, 3] uint8 of one size -> fields [B, h, w, C] and prefixes [B, n, C]."""
        images = self.network.image(*pixels, device=self.device)
        field, prefix = self.srt(images)
        field = field.permute(0, 2, 3, 1)  # dense, because channels are last in memory
        if self._components is not None:
            field = _project(field, self._components)
        dtype = DTYPES[self.dtype]
        # Made contiguous on the device, so that the transfer is a single copy.
        field = cast("field", field, dtype).contiguous().cpu()
        if field[0].nbytes >= LARGEST:
            rule = "a value in Parquet must be smaller than 2 GiB"
            raise ValueError(f"{rule}, got a field of {field[0].nbytes} bytes: use a larger stride")
        return field, None if prefix is None else cast("prefix", prefix, dtype).contiguous().cpu()


_Row = dict[str, Any]  # ``name``, ``reason``, and the known columns of _MADE
_Picture = tuple[_Row, np.ndarray]  # [H, W, 3] uint8


def _reason(name: str, error: Exception) -> str:
    named = isinstance(error, ImageError)
    return one_line(str(error) if named else f"{name}: {describe(error)}")


# ---- arguments ----------------------------------------------------------------------------------


def _network(
    model: str | nn.Module, weights: Any, mean: Any, std: Any, layer: Any, known: dict[str, Any]
) -> Network:
    """``known``: arguments of :func:`srt_ext.backbones.describe`."""
    given = [name for name, value in {"mean": mean, "std": std}.items() if value is not None]
    if isinstance(model, str):
        if given:
            rule = "mean and std must be omitted for a model by name"
            raise wrong(ValueError, _WHERE, rule, " and ".join(given))
        return Network.load(model, None if weights is None else Path(weights), layer, **known)
    if not isinstance(model, nn.Module):
        rule = "model must be a name or a torch.nn.Module"
        raise wrong(TypeError, _WHERE, rule, type(model).__name__)
    if weights is not None:
        rule = "weights must be omitted for a module"
        raise wrong(ValueError, _WHERE, rule, repr(weights))
    if len(given) == 1:
        raise wrong(ValueError, _WHERE, "mean and std must be given together", f"only {given[0]}")
    mean, std = (np.atleast_1d(x).astype(float) for x in ((mean, std) if given else IMAGENET))
    ranges = np.isfinite([*mean, *std]).all() and (std > 0).all()
    if not ranges or {mean.shape, std.shape} - {(1,), (3,)}:
        rule = "mean and std must be 1 or 3 finite numbers, std > 0"
        raise wrong(ValueError, _WHERE, rule, f"{mean.tolist()} and {std.tolist()}")
    name, model = type(model).__name__, copy.deepcopy(model).eval()
    return Network(name, model, mean.tolist(), std.tolist(), layer, **known)


def _components(pca: Any) -> torch.Tensor:
    """[K, C] float32."""
    if isinstance(pca, (str, os.PathLike)):
        pca = read_components(*filesystem(os.fspath(pca)))
    components = torch.tensor(np.asarray(pca, np.float32))
    if components.ndim != 2:
        raise wrong(ValueError, _WHERE, "pca must be components [K, C]", list(components.shape))
    return components


def _project(field: torch.Tensor, components: torch.Tensor) -> torch.Tensor:
    """field [B, h, w, C] -> [B, h, w, K], float32."""
    if field.shape[3] != components.shape[1]:
        rule = f"pca must have {field.shape[3]} channels, like the features of the model"
        raise wrong(ValueError, _WHERE, rule, components.shape[1])
    return nn.functional.linear(field.float(), components)


# ---- tables -------------------------------------------------------------------------------------


def _table(batch: Any) -> pa.Table:
    if isinstance(batch, pa.Table):
        return batch
    if not isinstance(batch, Mapping):
        rule = "the batch must be a pyarrow.Table or a dict of arrays (batch_format of map_batches)"
        raise wrong(TypeError, _WHERE, rule, type(batch).__name__)
    try:
        return pa.table(dict(batch))
    except (pa.ArrowException, TypeError):  # Ray converts tensors and Python objects
        from ray.data.block import BlockAccessor

        return BlockAccessor.for_block(BlockAccessor.batch_to_block(batch)).to_arrow()


def _rows(table: pa.Table) -> list[_Row]:
    """The existing reasons of a batch, and the names of the images for new reasons."""
    column = next((name for name in _KEYS if name in table.column_names), None)
    nothing = [None] * table.num_rows
    names = table[column].to_pylist() if column else nothing
    reasons = table["reason"].to_pylist() if "reason" in table.column_names else nothing
    return [
        {"name": f"row {i}" if name is None else str(name), "reason": reason}
        for i, (name, reason) in enumerate(zip(names, reasons, strict=True))
    ]


def _joined(table: pa.Table, rows: list[dict[str, Any]], column: str) -> pa.Table:
    """The columns of a batch, without ``column`` and ``reason``, and the columns of ``rows``."""
    columns: dict[str, Any] = {}
    for name, values in zip(table.column_names, table.columns, strict=True):
        if name in (column, "reason"):
            continue
        while name in _MADE.names or name in columns:
            name = f"source_{name}"
        columns[name] = values
    for field in _MADE:
        made = [row.get(field.name) if row["reason"] is None else None for row in rows]
        is_blob = pa.types.is_large_binary(field.type)
        columns[field.name] = _blobs(made) if is_blob else pa.array(made, field.type)
    columns["reason"] = pa.array([row["reason"] for row in rows], pa.string())
    return pa.table(columns)


def _blobs(tensors: list[torch.Tensor | None]) -> pa.ChunkedArray:
    """A chunk for each dense tensor on the CPU, without a copy."""
    kind, chunks = pa.large_binary(), []
    for tensor in tensors:
        if tensor is None:
            chunks.append(pa.nulls(1, kind))
            continue
        data = tensor.flatten().view(torch.uint8).numpy()
        offsets = pa.py_buffer(np.array([0, data.size], np.int64))
        chunks.append(pa.Array.from_buffers(kind, 1, [None, offsets, pa.py_buffer(data)]))
    return pa.chunked_array(chunks, kind)
