"""SRT around anchors: the field of a rolled image is the rolled field, whatever the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import srt_ext
from srt_ext import SRT, reference, views
from srt_ext.views import Views

PATCH = (8, 4)
SIZE = (40, 24)
ROLLS = ((1, -3), (-5, 2))  # of the two images, in cells
CIRCULAR: dict[str, Any] = {"padding": "circular", "border": "circular", "patch": PATCH}


class Placed(nn.Module):
    """Tokens depend on their position and on all others, as in a ViT; one prefix token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 6, PATCH, stride=PATCH)
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 5)])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        tokens = tokens + torch.linspace(-1, 1, tokens.shape[1]).to(tokens)[:, None]
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
        for block in self.blocks:
            tokens = block(tokens + tokens.square().mean(1, keepdim=True)).tanh()
        return tokens


def images_of(batch: int = 2, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 3, *SIZE, generator=generator, dtype=torch.float64).to(dtype)


def rolled(images: torch.Tensor, stride: tuple[int, int] = (1, 1)) -> torch.Tensor:
    """Rolls each image by its entry of ROLLS, in cells of ``stride`` pixels."""
    pairs = zip(images, ROLLS, strict=True)
    return torch.stack([i.roll((y * stride[0], x * stride[1]), (1, 2)) for i, (y, x) in pairs])


def anchored(**settings: Any) -> SRT:
    model = Placed().double().eval()
    return SRT(model, **{"anchor": "full", "prefix": 1, **CIRCULAR, **settings})


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "strides": {"views": 4, "stride": (2, 4)},
    "tokens": {"views": 4, "stride": PATCH},
    "nearest": {"views": 4, "upsample": "nearest"},
    "parts of pixels": {"views": views.sobol(5, 3).offsets},
    "bicubic": {"views": views.sobol(5, 3).offsets, "interpolation": "bicubic"},
    "flips": {"views": "4+flip+vflip"},
    "weights": {"views": "ring:5:3"},
    "preset": {"quality": "outlines"},
    "layers": {"views": 4, "layers": ["blocks.1", "blocks.0"]},
    "median": {"views": 5, "reduce": "median", "view_batch": 2},
    "streaming": {"views": 5, "streaming": True, "view_batch": 2},
    "streamed median": {"views": 9, "streaming": True, "reduce": "median", "stride": 4},
    "parts": {"views": 5, "stride": PATCH, "view_batch": 1},
    "auto": {"views": 3, "view_batch": "auto"},
}


def assert_equivariant(
    call: Callable[[torch.Tensor], Any], stride: tuple[int, int] = (1, 1)
) -> None:
    """Asserts that fields roll with the image and prefix tokens do not change."""
    images = images_of()
    outputs, expected = call(rolled(images, stride)), call(images)
    if not isinstance(outputs, list):
        outputs, expected = [outputs], [expected]
    for output, right in zip(outputs, expected, strict=True):
        for field, other in zip(output[:-1], right[:-1], strict=True):
            torch.testing.assert_close(field, rolled(other))
            assert other.std((2, 3)).min() > 1e-3  # the field is not constant
            assert field.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(output.prefix, right.prefix)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_field_of_a_rolled_image_is_the_rolled_field(name: str) -> None:
    srt = anchored(**SETTINGS[name])
    assert srt.scale == 1
    assert_equivariant(srt, srt.stride)


@pytest.mark.parametrize("streaming", [False, True])
def test_moments_roll_with_the_image(streaming: bool) -> None:
    assert_equivariant(anchored(views=5, streaming=streaming, view_batch=2).moments)


def test_a_vit_with_position_embeddings_is_equivariant_to_rounding() -> None:
    """The bundled small ViT. Without an anchor its field differs."""
    pytest.importorskip("timm")
    pytest.importorskip("safetensors")
    from srt_ext.demo.small import load_small

    model, images = load_small()[0], images_of(1, torch.float32).repeat(1, 1, 1, 2)[..., :40]
    apart = {}
    for anchor in (None, "phase", "full"):
        srt = SRT(model, padding="circular", border="circular", anchor=anchor)  # type: ignore[arg-type]
        field = srt(images).field
        difference = srt(images.roll((3, -5), (2, 3))).field - field.roll((3, -5), (2, 3))
        apart[anchor] = (difference.norm() / field.norm()).item()
    assert apart["full"] < 1e-6
    assert apart[None] > 0.05


@pytest.mark.parametrize("batch", [1, 2])
def test_fields_of_saturated_images_are_equivariant(batch: int) -> None:
    """Several pixels have the largest energy, as in many photographs."""
    images = images_of(batch).clamp(-0.5, 0.5)
    assert (images.abs() == 0.5).float().mean() > 0.5
    srt = anchored(views=4)
    for roll in ((3, -5), (17, 11)):
        field = srt(images.roll(roll, (2, 3))).field
        torch.testing.assert_close(field, srt(images).field.roll(roll, (2, 3)))


def test_a_phase_is_enough_for_models_that_roll_with_their_patches() -> None:
    def model(images: torch.Tensor) -> torch.Tensor:
        maps = F.avg_pool2d(images, PATCH)
        maps = maps + maps.roll((1, -1), (2, 3)).tanh() * maps.roll(1, 3)
        return maps.flatten(2).transpose(1, 2)

    images = images_of()
    for anchor in ("phase", "full"):
        assert_equivariant(SRT(model, 4, anchor=anchor, prefix=0, **CIRCULAR))  # type: ignore[arg-type]
    plain = SRT(model, 4, prefix=0, **CIRCULAR)
    assert (plain(rolled(images)).field - rolled(plain(images).field)).abs().max() > 0.01
    # Without an anchor, only for rolls by whole patches.
    back = images.roll((-8, 12), (2, 3))
    torch.testing.assert_close(plain(back).field, plain(images).field.roll((-8, 12), (2, 3)))


@pytest.mark.parametrize("anchor", [None, "phase", "full"])
@pytest.mark.parametrize("reduce", ["mean", "median"])
def test_the_field_equals_the_oracle(anchor: Any, reduce: Any) -> None:
    """The oracle shifts, mirrors, mirrors back and aggregates the views around the anchor."""
    images, model = images_of(), Placed().double()
    offsets = torch.cat([views.sobol(4, 3).offsets, torch.tensor([[50.25, -31.0]])])
    mirror = torch.tensor([[True, False], [False, True], [True, True], [False] * 2, [False] * 2])
    modes: Any = {"reduce": reduce, "stride": (2, 4)}
    srt = SRT(model, Views(offsets, None, mirror), anchor=anchor, prefix=1, **CIRCULAR, **modes)
    field, prefix = srt(images)
    grid = (SIZE[0] // PATCH[0], SIZE[1] // PATCH[1])
    for image, made, mean in zip(images, field, prefix, strict=True):
        own = offsets.double()
        if anchor is not None:
            own = own - srt_ext.polyphase(image[None], PATCH, full=anchor == "full")
        tokens = []
        for view, axes in zip(
            reference.shift(image[None], own, padding="circular"), mirror.tolist(), strict=True
        ):
            dims = [dim for dim, flip in ((2, axes[0]), (3, axes[1])) if flip]
            out = model(view.flip(dims)).detach()
            maps = out[:, 1:].unflatten(1, grid).flip([dim - 1 for dim in dims])
            tokens.append(torch.cat([out[:, :1], maps.flatten(1, 2)], 1))
        every = torch.stack(tokens)
        args = (every[:, :, 1:], own, grid, PATCH)
        expected = reference.ensemble(*args, border="circular", **modes)
        torch.testing.assert_close(made[None], expected)
        torch.testing.assert_close(mean, every[:, 0, 0].mean(0)[None])


def test_tokens_come_with_the_offsets_of_each_image() -> None:
    images, srt = images_of(), anchored(views="ring:5:3+flip", view_batch=4)
    batches = list(srt.tokens(images))
    offsets = torch.cat([batch.offsets for batch in batches])  # [V, B, 2]
    weights = torch.cat([batch.weights for batch in batches])  # type: ignore[arg-type]
    tokens = torch.cat([batch.layers[0].tokens for batch in batches])
    layer = batches[0].layers[0]
    assert offsets.shape == (10, 2, 2)
    for i, field in enumerate(srt(images).field):
        args = (tokens[:, i : i + 1], offsets[:, i], layer.grid, layer.patch, weights)
        torch.testing.assert_close(srt_ext.ensemble(*args, border="circular")[0], field)
    expected = srt(images)
    for batch in srt.tokens(images):
        batch.offsets.zero_()
    torch.testing.assert_close(srt(images), expected)


def test_settings_are_kept_and_cost_is_counted() -> None:
    srt, images = anchored(views=4), images_of()
    plain = anchored(views=4, anchor=None)
    assert (srt.anchor, plain.anchor) == ("full", None)
    torch.testing.assert_close(copy.deepcopy(srt)(images), srt(images))
    assert srt.cost(SIZE, 2)[:2] == plain.cost(SIZE, 2)[:2]
    assert srt(images[:0]).field.shape == (0, 5, *SIZE)
    done: list[int] = []
    anchored(views=5, view_batch=2)(images, done.append)
    assert done == [2, 4, 5]
    half = anchored(views=4).half()
    assert half(images.half()).field.dtype == torch.float16


def test_inject_supports_circular_images() -> None:
    """Without an anchor, because the result is the output of the model."""
    torch.manual_seed(0)
    first = nn.Conv2d(3, 4, PATCH, stride=PATCH)
    model = nn.Sequential(first, nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular")).double()
    images, offsets = images_of(), torch.tensor([[0.0, 0.0], [3.0, -6.0]])
    result = SRT(model, offsets, inject="0", **CIRCULAR)(images)
    tokens = torch.stack([first(v) for v in srt_ext.shift(images, offsets, padding="circular")])
    args = (tokens.flatten(3).transpose(2, 3).contiguous(), offsets, (5, 6), PATCH)
    modes: Any = {"upsample": "nearest", "border": "circular", "stride": PATCH}
    torch.testing.assert_close(result, model[1](srt_ext.ensemble(*args, **modes)))


def test_exported_and_compiled() -> None:
    """The anchor is computed for each image; the number of images is fixed."""
    srt, images = anchored(views=4, stride=4), images_of()
    torch.compiler.reset()
    program = torch.export.export(srt, (images,), strict=False).module()
    compiled = torch.compile(srt, backend="eager")
    for given in (images, rolled(images)):
        torch.testing.assert_close(program(given), srt(given))
        torch.testing.assert_close(compiled(given), srt(given))
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    with pytest.raises(Exception, match="batch"):
        torch.export.export(srt, (images,), dynamic_shapes=(batch,), strict=False)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"padding": "reflect"}, ValueError, "padding must be 'circular' if border is .*; got 're"),
        ({"border": "zeros"}, ValueError, "border and padding must be 'circular' with anchor; got"),
        ({"anchor": "half"}, ValueError, "anchor must be one of 'phase', 'full'; got 'half'"),
        ({"anchor": True}, TypeError, "anchor must be a string; got bool"),
        ({"scale": 1.25}, ValueError, "scale must be 1 with border 'circular'; got 1.25"),
        ({"scale": 2, "anchor": None}, ValueError, "scale must be 1 with border 'circular'; got 2"),
        ({"inject": "embed"}, ValueError, "anchor must be None with inject.*; got 'full'"),
    ],
)
def test_wrong_settings_raise(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"SRT: {message}"):
        anchored(**settings)


@pytest.mark.parametrize("anchor", [None, "phase", "full"])
@pytest.mark.parametrize(
    ("size", "stride", "whole"),
    [((39, 24), 1, (8, 4)), ((40, 26), 2, (8, 4)), ((40, 24), 3, (24, 12)), (SIZE, 16, (16, 16))],
)
def test_sizes_that_are_not_whole_multiples_raise(
    anchor: Any, size: Any, stride: int, whole: Any
) -> None:
    srt = anchored(anchor=anchor, views=4, stride=stride)
    height, width = whole
    message = rf"multiples of \[{height}, {width}\] pixels .*; got \[{size[0]}, {size[1]}\]"
    for call in (srt, srt.moments, srt.tokens, lambda images: srt.cost(images.shape[2:])):
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(1, 3, *size, dtype=torch.float64))


def test_images_larger_than_the_largest_offset_raise() -> None:
    image = torch.zeros(1, 3, 8, 2**20 + 4, dtype=torch.uint8).half()
    with pytest.raises(ValueError, match=r"at most 2\^20 pixels on each axis with anchor; got \[8"):
        anchored(views=4)(image)
