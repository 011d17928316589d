"""Enlarged images, strides of any number of pixels, mirrored views, presets, and cost."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from process import needs_proc, peak_of

import srt_ext
from srt_ext import SRT, reference, views
from srt_ext import srt as srt_module
from srt_ext.views import Views

SCALES = (1, 1.25, 1.37, 1.5, 2)


def pooled(patch: tuple[int, int]) -> Any:
    """A model whose tokens are the means of patches: [B, 3, H, W] -> [B, h * w, 3]."""
    return lambda images: F.avg_pool2d(images, patch).flatten(2).transpose(1, 2)


def places(height: int, width: int) -> torch.Tensor:
    """[1, 3, H, W]: y, x and 0 at the centre of each pixel."""
    y, x = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([rows, columns, torch.zeros_like(rows)])[None]


# ---- geometry -----------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [(14, 14), (16, 16), (8, 4)])
@pytest.mark.parametrize("stride", [1, (3, 2), 4, 8])
@pytest.mark.parametrize("scale", SCALES)
def test_cells_are_at_their_coordinates(patch: tuple[int, int], stride: Any, scale: float) -> None:
    """Tokens contain their coordinates: the field is y and x, except near the border."""
    size = (101, 87)
    for given_views in (1, "best:4+flip", "grid:3", views.sobol(5, 3).offsets):
        srt = SRT(pooled(patch), given_views, patch=patch, stride=stride, scale=scale)
        field = srt(places(*size)).field
        assert field.shape[2:] == tuple(-(-n // s) for n, s in zip(size, srt.stride, strict=True))
        for axis in (0, 1):
            middles = (torch.arange(field.shape[2 + axis]) + 0.5) * srt.stride[axis]
            inner = (middles > 24) & (middles < size[axis] - 24)
            found = field[0, axis].movedim(axis, 0)[inner]
            expected = middles[inner, None].expand_as(found)
            # The bicubic kernel with a = -0.75 moves a slope by up to 0.02 pixels.
            torch.testing.assert_close(found, expected, rtol=0, atol=0.02 if scale > 1 else 1e-3)


@pytest.mark.parametrize("scale", SCALES[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_model_sees_the_enlarged_image(scale: float, dtype: torch.dtype) -> None:
    """As F.interpolate to a size for integer scales, by a factor for others."""
    images = torch.randn(2, 3, 33, 46, generator=torch.Generator().manual_seed(0)).to(dtype)
    seen: list[torch.Tensor] = []

    def model(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return pooled((4, 4))(images)

    field = SRT(model, 1, patch=4, scale=scale, stride=8)(images).field
    assert field.shape == (2, 3, 5, 6)
    size = [math.ceil(n * scale) for n in images.shape[2:]]
    by_factor = F.interpolate(images, scale_factor=scale, mode="bicubic")
    height, width = by_factor.shape[2:]  # rounded down
    assert torch.equal(seen[0][:, :, :height, :width], by_factor)
    if scale == 2:
        by_size = F.interpolate(images, size=size, mode="bicubic")
        assert torch.equal(seen[0][:, :, : size[0], : size[1]], by_size)
    inner = seen[0][:, :, : size[0], : size[1]]
    below = seen[0].shape[2] - size[0]
    expected = F.pad(inner, (0, seen[0].shape[3] - size[1], 0, below), mode="replicate")
    assert torch.equal(seen[0], expected)


def test_fractional_cells_interpolate_the_finer_field_at_their_centres() -> None:
    images = torch.randn(1, 3, 40, 56)
    settings: dict[str, Any] = {"patch": 4, "scale": 1.5}
    moments = SRT(pooled((4, 4)), "grid:2", stride=3, **settings).moments(images)
    enlarged = F.interpolate(images, size=(60, 84), mode="bicubic")
    fine = SRT(pooled((4, 4)), torch.round(views.grid(2).offsets * 1.5), patch=4, stride=4)
    for field, whole in zip(moments[:2], fine.moments(F.pad(enlarged, (0, 8, 0, 8))), strict=False):
        # A cell of 4.5 pixels starts every 4.5 / 4 cells of the finer field.
        at = (torch.arange(8) + 0.5) * 4.5 / 4 - 0.5
        low = at.floor().long()
        rows = whole[:, :, low] + (at - low)[:, None] * (whole[:, :, low + 1] - whole[:, :, low])
        part = rows[..., low] + (at - low) * (rows[..., low + 1] - rows[..., low])
        torch.testing.assert_close(field[:, :, 1:8, 1:8], part[:, :, 1:8, 1:8])


SIZES = [(h, w) for h in (1, 13, 97, 112, 120) for w in (5, 30, 56, 64, 101, 128)]


@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_every_stride_supports_every_size_and_patch(patch: int, stride: int) -> None:
    """The field equals that of the image padded to whole patches and cells; thirty sizes."""
    for height, width in SIZES:
        images = torch.randn(1, 3, height, width)
        whole = math.lcm(patch, stride)
        padded = F.pad(images, (0, -width % whole, 0, -height % whole), mode="replicate")
        srt = SRT(pooled((patch, patch)), "grid:1", patch=patch, stride=stride)
        field = srt(images).field
        assert field.shape[2:] == (-(-height // stride), -(-width // stride))
        tokens = torch.stack(
            [pooled((patch, patch))(v) for v in srt_ext.shift(padded, srt.views.offsets)]
        )
        grid = (padded.shape[2] // patch, padded.shape[3] // patch)
        args = (tokens, srt.views.offsets, grid, (patch, patch))
        expected = srt_ext.ensemble(*args, stride=stride)
        torch.testing.assert_close(field, expected[:, :, : field.shape[2], : field.shape[3]])


# ---- mirrored views -----------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["mean", "median"])
@pytest.mark.parametrize("view_batch", [1, 4, 100])
def test_mirrored_views_are_mirrored_back(reduce: Any, view_batch: int) -> None:
    """The oracle shifts and mirrors each view, and mirrors its map of tokens back."""
    torch.manual_seed(0)
    model = torch.nn.Conv2d(3, 4, (8, 4), stride=(8, 4))  # not symmetric
    images, offsets = torch.randn(2, 3, 40, 20), views.sobol(7, 3).offsets
    mirror = torch.rand(7, 2) < 0.5
    assert mirror.any(0).all()
    weights = torch.rand(7) if reduce == "mean" else None
    maps = []
    for view, (y, x) in zip(reference.shift(images, offsets), mirror.tolist(), strict=True):
        dims = [dim for dim, flip in ((2, y), (3, x)) if flip]
        maps.append(model(view.float().flip(dims)).flip(dims))
    tokens = torch.stack(maps).flatten(3).transpose(2, 3)
    modes: Any = {"reduce": reduce, "stride": 2}
    expected = reference.ensemble(tokens, offsets, (5, 5), (8, 4), weights, **modes)
    design = Views(offsets, weights, mirror)
    srt = SRT(model, design, patch=(8, 4), view_batch=view_batch, **modes)
    torch.testing.assert_close(srt(images).field, expected.float())
    found = torch.cat([batch.layers[0].tokens for batch in srt.tokens(images)])
    torch.testing.assert_close(found, tokens)


def test_inject_treats_the_mirrored_image_as_a_view() -> None:
    """It is not confused with the unshifted image, whose forward pass runs to the end."""
    torch.manual_seed(0)
    first = torch.nn.Conv2d(3, 4, 8, stride=8)
    model = torch.nn.Sequential(first, torch.nn.Flatten(), torch.nn.Linear(4 * 6, 2))
    images = torch.randn(1, 3, 16, 24)
    mirror = torch.tensor([[False, True]])
    result = SRT(model, Views(torch.zeros(1, 2), None, mirror), inject="0", patch=8)(images)
    torch.testing.assert_close(result, model[1:](first(images.flip(3)).flip(3)))
    both = SRT(model, "grid:0+flip", inject="0", patch=8)(images)
    mean = (first(images) + first(images.flip(3)).flip(3)) / 2
    torch.testing.assert_close(both, model[1:](mean))


# ---- settings -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit() -> Any:
    timm = pytest.importorskip("timm")
    small = {"depth": 2, "embed_dim": 48, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **small).eval()


def number(srt: SRT) -> int:
    return len(srt.views.offsets)


def test_presets_set_scale_and_number_of_views(vit: Any) -> None:
    presets = srt_module.PRESETS
    for name, (scale, count) in presets.items():
        srt = SRT(vit, quality=name)  # type: ignore[arg-type]
        assert (srt.scale, number(srt)) == (scale, count)
    assert (SRT(vit).scale, number(SRT(vit))) == presets[srt_module.DEFAULT]
    count = presets[srt_module.DEFAULT][1]
    assert (SRT(vit, 7).scale, number(SRT(vit, 7))) == (1, 7)
    assert (SRT(vit, scale=2).scale, number(SRT(vit, scale=2))) == (2, count)
    assert (SRT(vit, inject=0).scale, number(SRT(vit, inject=0))) == (1, count)
    # Offsets are in pixels of the image.
    torch.testing.assert_close(SRT(vit, 9, scale=1.5).views.offsets * 1.5, views.best(9).offsets)
    assert SRT(vit, np.int64(4), scale=np.float32(1.5)).scale == 1.5  # type: ignore[arg-type]
    given_offsets = torch.tensor([[1.0, 0.3], [-2.0, 5.0]])
    torch.testing.assert_close(SRT(vit, given_offsets, scale=1.5).views.offsets, given_offsets)


def test_a_preset_enlarges_only_for_models_that_declare_any_size(vit: Any) -> None:
    timm = pytest.importorskip("timm")
    fixed = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=48, num_heads=4).eval()
    for model, settings in (
        (fixed, {}),
        (vit, {"layers": "blocks.0"}),
        (pooled((8, 8)), {"patch": 8}),
    ):
        with pytest.warns(UserWarning, match="'outlines' uses scale 1 instead of") as caught:
            srt = SRT(model, quality="outlines", **settings)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert (srt.scale, number(srt)) == (1, srt_module.PRESETS["outlines"][1])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            SRT(model, 4, **settings)
            assert SRT(model, scale=1.5, **settings).scale == 1.5
            assert SRT(model, scale=1, **settings).scale == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"quality": "better"}, ValueError, "quality must be one of .*; got 'better'"),
        ({"quality": 2}, TypeError, "quality must be a string"),
        ({"quality": "fast", "views": 4}, ValueError, "omitted if .*got 'fast', views 4"),
        ({"quality": "fast", "scale": 1}, ValueError, "if views or scale is given; got .*scale 1"),
        ({"scale": 0.5}, ValueError, r"scale must be a number from 1 to 2\^24; got 0.5"),
        ({"scale": math.nan}, ValueError, "got nan"),
        ({"scale": math.inf}, ValueError, "got inf"),
        ({"scale": "2"}, TypeError, "got '2'"),
        ({"scale": True}, TypeError, "got True"),
        ({"scale": 1j}, TypeError, "got 1j"),
        ({"scale": 1.5, "inject": "0"}, ValueError, "scale must be 1 with inject; got 1.5"),
    ],
)
def test_wrong_settings_raise(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 8, stride=8))
    with pytest.raises(error, match=message):
        SRT(model, **{"patch": 8, **arguments})


@pytest.mark.parametrize("settings", [{"scale": 2**24}, {"stride": 2**62}, {"stride": 2**25}])
def test_images_beyond_the_largest_size_raise(settings: dict[str, Any]) -> None:
    rule = r"at most 2\^24 pixels on each axis, enlarged by scale and padded .*; got \d+"
    with pytest.raises(ValueError, match=rule):
        SRT(pooled((8, 8)), patch=8, views=4, **settings)(torch.rand(1, 3, 32, 30))


def test_views_are_copied() -> None:
    offsets, weights = torch.zeros(2, 2), torch.ones(2)
    mirror = torch.zeros(2, 2, dtype=torch.bool)
    srt = SRT(pooled((8, 8)), Views(offsets, weights, mirror), patch=8)
    image = torch.randn(1, 3, 16, 16)
    before = srt(image).field
    offsets[1], weights[1] = torch.nan, -1
    mirror.fill_(True)
    assert torch.equal(srt(image).field, before)


def test_a_number_of_views_follows_the_patch_of_the_model(vit: Any) -> None:
    timm = pytest.importorskip("timm")
    srt = SRT(vit, 9)
    assert torch.equal(srt.views.offsets, views.best(9, 6).offsets)
    srt.model = timm.create_model(
        "vit_tiny_patch16_224", patch_size=8, depth=1, embed_dim=48, dynamic_img_size=True
    ).eval()
    assert srt(torch.randn(1, 3, 32, 32)).field.shape == (1, 48, 32, 32)
    assert torch.equal(srt.views.offsets, views.best(9, 3).offsets)
    preset = SRT(vit, quality="outlines")
    preset.model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=48).eval()
    with pytest.warns(UserWarning, match="'outlines' uses scale 1"):
        assert preset(torch.randn(1, 3, 224, 224)).field.shape == (1, 48, 224, 224)
    assert preset.scale == 1


# ---- cost ---------------------------------------------------------------------------------------


def vit_operations(tokens: int, depth: int, width: int, patch: int = 16) -> int:
    """Operations of a forward pass of a ViT with a class token; a multiply-add counts as two."""
    embed = tokens * 3 * patch**2 * width
    count = tokens + 1
    linear = count * width**2 * (3 + 1 + 4 + 4)  # qkv, projection, MLP
    attention = 2 * count**2 * width
    return 2 * (embed + depth * (linear + attention))


@pytest.mark.parametrize("size", [(224, 224), pytest.param((470, 850), marks=pytest.mark.slow)])
def test_operations_equal_the_closed_form(size: tuple[int, int]) -> None:
    timm = pytest.importorskip("timm")
    small = {"depth": 2, "embed_dim": 96, "num_heads": 3}
    model = timm.create_model("vit_small_patch16_224", dynamic_img_size=True, **small).eval()
    for scale, count, stride in ((1, 3, 8), (1.5, 4, 8), (2, 1, 1)):
        settings: dict[str, Any] = {"scale": scale, "stride": stride}
        cost = SRT(model, count, view_batch=2, **settings).cost(size, batch=2)
        whole = math.lcm(16, int(stride * scale))
        padded = [-(-math.ceil(n * scale) // whole) * whole for n in size]
        tokens = padded[0] // 16 * (padded[1] // 16)
        assert cost.tokens == 2 * count * tokens
        expected = 2 * count * vit_operations(tokens, depth=2, width=96)
        assert abs(cost.operations / expected - 1) < 0.01


class Keeps(torch.nn.Module):
    """A model that stores a tensor in its forward pass, and counts calls in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 4, 8, stride=8), torch.nn.BatchNorm2d(4)
        self.bias: torch.Tensor | None = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.norm(self.conv(images))
        if self.bias is None:
            self.bias = features.new_ones(features.shape[1:])
        return features + self.bias


def test_cost_does_not_change_the_model() -> None:
    model = Keeps()
    srt = SRT(model, 4, patch=8)
    with pytest.warns(UserWarning, match="training mode"):
        srt.cost((32, 48))
    assert model.bias is None
    assert model.norm.num_batches_tracked == 0
    model.eval()
    field = srt(torch.randn(1, 3, 32, 48)).field
    assert type(field) is torch.Tensor
    cost = srt.cost((32, 48))
    assert cost.operations == 4 * 2 * 24 * (3 * 8 * 8) * 4


def test_cost_of_inject_counts_the_forward_that_runs_to_the_end(vit: Any) -> None:
    without = SRT(vit, 4, inject=0).cost((64, 96))
    within = SRT(vit, 5, inject=0).cost((64, 96))  # the unshifted image is one of them
    assert without.tokens == within.tokens == 5 * 24
    assert without.operations == within.operations


def test_cost_of_a_callable_in_half_precision() -> None:
    model = torch.nn.Conv2d(3, 4, 8, stride=8).half()
    srt = SRT(lambda images: model(images), 4, patch=8)
    assert srt.cost((32, 48), dtype=torch.float16) == SRT(model, 4, patch=8).cost((32, 48))


def test_cost_of_a_model_that_needs_values_raises() -> None:
    def model(images: torch.Tensor) -> torch.Tensor:
        return pooled((8, 8))(images) * (1 if images.sum().item() > 0 else 2)

    with pytest.raises(ValueError, match="model must run on fake tensors for cost; it raised Data"):
        SRT(model, 4, patch=8).cost((32, 48))


MEMORY = """
import timm
from srt_ext import SRT
model = timm.create_model("vit_small_patch16_224", depth=3, dynamic_img_size=True).eval()
srt = SRT(model, 8, stride={stride}, view_batch={view_batch}, scale={scale})
image = torch.randn(1, 3, {size}, {size})
SRT(model, 1, stride=8)(image[..., :64, :64])
"""


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stride", "view_batch", "scale", "size"),
    [(1, 8, 1, 512), (4, 2, 1.5, 512), (8, 8, 2, 448)],
)
def test_memory_of_cost_is_close_to_the_peak_of_a_call(
    stride: int, view_batch: int, scale: float, size: int
) -> None:
    pytest.importorskip("timm")
    names = {"stride": stride, "view_batch": view_batch, "scale": scale, "size": size}
    setup = MEMORY.format(**names)
    taken, _ = peak_of(setup, "srt(image).field", "True")
    space: dict[str, Any] = {"torch": torch}
    exec(setup, space)
    counted = space["srt"].cost((size, size)).memory
    assert abs(counted / taken - 1) < 0.2


def test_cost_supports_any_module() -> None:
    model = torch.nn.Conv2d(3, 5, 8, stride=8)
    cost = SRT(model, 4, patch=8, stride=8).cost((30, 24))
    assert cost.operations == 4 * 2 * 12 * (3 * 8 * 8) * 5
    assert cost.tokens == 4 * 12
    assert 4 * 4 * 3 * 32 * 24 < cost.memory < 8 * 4 * 4 * 3 * 32 * 24
    weighted = SRT(model, "ring:5:3+flip", patch=8, scale=1.5, view_batch="auto")
    assert weighted.cost((30, 24), batch=2).operations == 2 * 10 * 2 * 30 * (3 * 8 * 8) * 5
    for reduce in ("mean", "median"):
        for streaming in (False, True):
            srt = SRT(model, 4, patch=8, reduce=reduce, streaming=streaming)  # type: ignore[arg-type]
            assert srt.cost((30, 24)).operations == cost.operations
    for size, error in (((30,), ValueError), ((0, 3), ValueError), ((2.5, 3), TypeError)):
        with pytest.raises(error, match="size must be an integer or a pair"):
            SRT(model, 4, patch=8).cost(size)  # type: ignore[arg-type]
    for settings, error, message in (
        ({"device": "foo"}, ValueError, "SRT: device must be .* or its name; got 'foo'"),
        ({"device": 3.5}, TypeError, "SRT: device must be .* or its name; got 3.5"),
        ({"dtype": "float32"}, TypeError, "SRT: dtype must be a floating.*; got 'float32'"),
        ({"dtype": torch.int64}, ValueError, "SRT: dtype must be a floating.*; got torch.int64"),
    ):
        with pytest.raises(error, match=message):
            SRT(model, 4, patch=8).cost(32, **settings)  # type: ignore[arg-type]
