"""SRT around models: real ones where timm is there, and small exact ones everywhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from peak import needs_proc, peak_of

import srt_ext
from srt_ext import SRT, reference, views
from srt_ext import srt as srt_module

PATCH = (8, 4)


def pooled(images: torch.Tensor) -> torch.Tensor:
    """A model whose tokens are patch means: images [B, 3, H, W] -> [B, h * w, 3]."""
    return F.avg_pool2d(images, PATCH).flatten(2).transpose(1, 2)


def with_prefix(images: torch.Tensor) -> torch.Tensor:
    """Two prefix tokens, the mean of the picture and ones, before the patches."""
    mean = images.mean((2, 3))[:, None]
    return torch.cat([mean, torch.ones_like(mean), pooled(images)], 1)


def expected_field(
    model: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, srt: SRT
) -> torch.Tensor:
    """What SRT means, from the oracle, in float64 and with no chunks: images of whole patches."""
    shifted = reference.shift(images, srt.views).float()
    tokens = torch.stack([model(view) for view in shifted])[:, :, srt.backbone.prefix or 0 :]
    grid = (images.shape[2] // PATCH[0], images.shape[3] // PATCH[1])
    return reference.ensemble(
        tokens, srt.views, grid, PATCH, border=srt.border, stride=srt.stride
    ).float()


@pytest.mark.parametrize("border", ["coverage", "zeros", "clamp"])
@pytest.mark.parametrize(
    ("stride", "view_batch"),
    [
        (1, 49),  # all at once
        (1, 4),  # batches, one ensemble
        (PATCH, 4),  # token scale: parts of one batch
        ((2, 2), 3),  # parts of several batches, the last one short
        ((40, 20), 1),  # one cell
    ],
)
def test_views_in_parts_equal_the_oracle(
    border: str, stride: int | tuple[int, int], view_batch: int
) -> None:
    images = torch.randn(2, 3, 40, 20, generator=torch.Generator().manual_seed(0))
    offsets = torch.cat([views.grid(3), torch.tensor([[0.4, -1.7], [21.0, 3.0]])])
    srt = SRT(pooled, offsets, stride=stride, view_batch=view_batch, patch=PATCH, border=border)
    field, prefix = srt(images)
    assert prefix is None
    torch.testing.assert_close(field, expected_field(pooled, images, srt))


def test_a_cell_that_no_part_covers_is_zero() -> None:
    srt = SRT(pooled, torch.full((5, 2), 30.0), stride=PATCH, view_batch=1, patch=PATCH)
    field = srt(torch.ones(1, 3, 40, 20)).field
    assert torch.equal(field, torch.zeros(1, 3, 5, 5))
    srt = SRT(pooled, torch.tensor([[8.0, 0.0]] * 5), stride=PATCH, view_batch=1, patch=PATCH)
    field = srt(torch.ones(1, 3, 40, 20)).field
    torch.testing.assert_close(field[:, :, :4], torch.ones(1, 3, 4, 5))
    assert torch.equal(field[:, :, 4:], torch.zeros(1, 3, 1, 5))


def test_prefix_tokens_are_stripped_and_averaged() -> None:
    images = torch.randn(2, 3, 40, 20)
    srt = SRT(with_prefix, "grid:1", view_batch=2, patch=PATCH, prefix=2)
    field, prefix = srt(images)
    torch.testing.assert_close(field, expected_field(with_prefix, images, srt))
    assert prefix is not None
    means = srt_ext.shift(images, srt.views).mean((0, 3, 4))
    torch.testing.assert_close(prefix, torch.stack([means, torch.ones_like(means)], 1))


@pytest.mark.parametrize(("height", "width"), [(37, 19), (40, 20), (1, 1), (33, 20)])
@pytest.mark.parametrize("stride", [1, (2, 4), PATCH])
def test_any_size_is_padded_and_cropped_back(
    height: int, width: int, stride: int | tuple[int, int]
) -> None:
    images = torch.randn(1, 3, height, width)
    whole = F.pad(images, (0, -width % PATCH[1], 0, -height % PATCH[0]), mode="replicate")
    srt = SRT(pooled, "grid:1", stride=stride, patch=PATCH)
    field = srt(images).field
    sh, sw = srt.stride
    assert field.shape[2:] == (-(-height // sh), -(-width // sw))
    assert torch.equal(field, srt(whole).field[:, :, : field.shape[2], : field.shape[3]])


@pytest.mark.parametrize("reduce", ["mean", "median"])
@pytest.mark.parametrize("streaming", [False, True])
def test_tokens_held_do_not_grow_with_the_views(
    reduce: str, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At token scale, or streaming, those of one batch of views, however many views there are."""
    held: list[int] = []
    kinds = srt_module._RUNNING

    class Spy(kinds[reduce]):  # type: ignore[misc]
        def update(self, tokens: torch.Tensor, *others: torch.Tensor | None) -> None:
            held.append(tokens.untyped_storage().nbytes())
            super().update(tokens, *others)

    monkeypatch.setitem(kinds, reduce, Spy)
    for radius in (1, 4):
        settings: dict[str, Any] = {"stride": PATCH, "view_batch": 3, "patch": PATCH}
        srt = SRT(pooled, views.grid(radius), reduce=reduce, streaming=streaming, **settings)
        srt(torch.randn(1, 3, 40, 20))
    if reduce == "median" and not streaming:
        assert not held  # an exact median holds all
    else:
        assert max(held) == 3 * 25 * 3 * 4  # views * tokens * channels * bytes


@pytest.mark.parametrize("stride", [1, PATCH])
def test_streaming_gives_the_same(stride: int | tuple[int, int]) -> None:
    images = torch.randn(2, 3, 40, 20)
    settings: dict[str, Any] = {"stride": stride, "patch": PATCH, "view_batch": 5}
    for border in ("coverage", "zeros", "clamp"):
        at_once, streamed = (
            SRT(with_prefix, "grid:3", border=border, streaming=s, prefix=2, **settings)
            for s in (False, True)
        )
        torch.testing.assert_close(streamed(images), at_once(images))
        torch.testing.assert_close(streamed.moments(images), at_once.moments(images))


def test_median_and_moments_are_those_of_the_ops() -> None:
    images = torch.randn(1, 3, 40, 20)
    offsets = views.grid(2)
    tokens = torch.stack([pooled(view) for view in srt_ext.shift(images, offsets)])
    args = (tokens, offsets, (5, 5), PATCH)
    srt = SRT(pooled, offsets, patch=PATCH, reduce="median")
    assert torch.equal(srt(images).field, srt_ext.ensemble(*args, reduce="median"))
    mean, var = srt_ext.ensemble_moments(*args)
    moments = srt.moments(images)
    assert torch.equal(moments.mean, mean)
    assert torch.equal(moments.var, var)
    assert moments.prefix is None


def test_a_streamed_median_is_close() -> None:
    """Views in raster order would drift: SRT spreads them."""
    images = torch.randn(1, 3, 40, 20)
    fields = [
        SRT(pooled, "grid:3", patch=PATCH, reduce="median", streaming=s, view_batch=4)(images).field
        for s in (False, True)
    ]
    spread = SRT(pooled, "grid:3", patch=PATCH).moments(images).var.sqrt().mean()
    assert (fields[0] - fields[1]).abs().mean() < 0.02 * spread


MEMORY = """
from srt_ext import SRT, views

def model(images):  # 4096 channels for a grid of 8 x 8
    return images[:, :1, ::8, ::8].flatten(2).transpose(1, 2).expand(-1, -1, 4096)

def field(radius):
    return SRT(model, views.grid(radius), stride=2, view_batch=2, patch=8)(image).field

image = torch.ones(1, 3, 64, 64)
field(0)
"""


@needs_proc
@pytest.mark.parametrize("radius", [4, 8])
def test_memory_is_two_outputs(radius: int) -> None:
    """The tokens of 81 views are 5 times the output, those of 289 views 18 times."""
    right = "((result - 1).abs() < 1e-5).all()"
    taken, output = peak_of(MEMORY, f"field({radius})", right)
    assert 2 * output <= taken < 2.25 * output  # and a batch of views


def test_progress_counts_views() -> None:
    done: list[int] = []
    SRT(pooled, "grid:1", view_batch=4, patch=PATCH)(torch.zeros(1, 3, 8, 8), done.append)
    assert done == [3, 6, 9]  # three batches of one size


def test_half_precision_tokens_keep_their_dtype() -> None:
    images = torch.randn(1, 3, 40, 20)
    for stride, batch in ((1, 49), (PATCH, 2)):
        srt = SRT(
            lambda x: pooled(x).bfloat16(), "grid:2", stride=stride, view_batch=batch, patch=PATCH
        )
        field = srt(images).field
        assert field.dtype == torch.bfloat16
        exact = SRT(pooled, "grid:2", stride=stride, view_batch=batch, patch=PATCH)(images).field
        torch.testing.assert_close(field.float(), exact, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch": None}, "patch must be given"),
        ({"patch": 0}, "patch must be two integers >= 1"),
        ({"prefix": -1}, "prefix must be an integer >= 0; got -1"),
        ({"stride": (2,)}, "stride must be two integers >= 1"),
        ({"views": torch.zeros(0, 2)}, "views must be"),
        ({"views": torch.zeros(3)}, "views must be"),
        ({"views": "ring:3"}, "views must be"),
        ({"view_batch": 0}, "view_batch must be an integer >= 1; got 0"),
        ({"stride": 0}, "stride must be"),
        ({"border": "mirror"}, "border must be one of .*; got 'mirror'"),
        ({"padding": "mirror"}, "padding must be one of"),
    ],
)
def test_wrong_settings(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SRT(pooled, **{"patch": PATCH, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stride": 2.0}, "stride must be two integers >= 1, .*; got 2.0"),
        ({"patch": "8"}, "patch must be two integers >= 1"),
        ({"patch": 8.0}, "patch must be two integers >= 1"),
        ({"view_batch": 2.5}, "view_batch must be an integer >= 1; got 2.5"),
        ({"prefix": 1.0}, "prefix must be an integer >= 0; got 1.0"),
        ({"views": [[0, 0]]}, "views must be a torch.Tensor, .*; got list"),
        ({"border": None}, "border must be a string"),
    ],
)
def test_settings_of_the_wrong_type(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        SRT(pooled, **{"patch": PATCH, **arguments})  # type: ignore[arg-type]


def test_wrong_inputs() -> None:
    srt = SRT(pooled, patch=PATCH)
    with pytest.raises(ValueError, match="images must be"):
        srt(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="must have pixels"):
        srt(torch.zeros(1, 3, 0, 8))
    with pytest.raises(ValueError, match="stride must divide"):
        SRT(pooled, stride=3, patch=PATCH)(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="the model must return tokens"):
        SRT(with_prefix, patch=PATCH, prefix=1)(torch.zeros(1, 3, 8, 8))
    with pytest.raises(TypeError, match="callable"):
        SRT(3, patch=PATCH)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"images must be a torch.Tensor; got list"):
        srt([[0.0]])


@pytest.mark.parametrize(
    ("views", "kind", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.int64), TypeError, "offsets must be float32 or float64"),
        (torch.tensor([[0.0, float("nan")]]), ValueError, "offsets must be finite"),
        (torch.tensor([[0.0, 2.0**21]]), ValueError, "offsets must be finite and at most"),
        ((torch.zeros(2, 2), torch.tensor([1, 1])), TypeError, "weights must be float32"),
        ((torch.zeros(2, 2), torch.tensor([1.0, -1.0])), ValueError, "weights must be finite and"),
        ((torch.zeros(2, 2), torch.zeros(2)), ValueError, r"not all be 0; got \[0.0, 0.0\]"),
    ],
)
def test_wrong_views_are_told_before_the_model_runs(
    views: object, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        SRT(pooled, views, patch=PATCH)  # type: ignore[arg-type]


def test_views_that_do_not_count_reach_nothing() -> None:
    def fails_to_the_right(images: torch.Tensor) -> torch.Tensor:
        tokens = with_prefix(images)
        tokens[images[:, 0, 0, 0] == 0] = torch.inf
        return tokens

    offsets = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    srt = SRT(
        fails_to_the_right,
        (offsets, torch.tensor([2.0, 0.0])),
        patch=PATCH,
        prefix=2,
        padding="zeros",
    )
    field, prefix = srt(torch.ones(1, 3, 16, 8))
    assert torch.equal(field, torch.ones(1, 3, 16, 8))
    assert torch.equal(prefix, torch.ones(1, 2, 3))


def tiny_vit(**arguments: object) -> torch.nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model: torch.nn.Module = timm.create_model(
        "vit_tiny_patch16_224", depth=2, dynamic_img_size=True, **arguments
    )
    return model.eval()


@pytest.mark.parametrize("registers", [0, 4])
def test_a_timm_vit_needs_no_settings(registers: int) -> None:
    model = tiny_vit(reg_tokens=registers, no_embed_class=bool(registers))
    images = torch.randn(1, 3, 48, 40)
    srt = SRT(model, "grid:1", view_batch=4)
    field, prefix = srt(images)
    assert field.shape == (1, 192, 48, 40)
    assert prefix is not None
    assert prefix.shape == (1, 1 + registers, 192)
    assert not field.requires_grad

    # One view of whole patches at token scale is the model's own output.
    plain = SRT(model, torch.zeros(1, 2), stride=16, upsample="nearest")(torch.ones(1, 3, 32, 48))
    with torch.no_grad():
        tokens = model.forward_features(torch.ones(1, 3, 32, 48))  # type: ignore[operator]
    torch.testing.assert_close(
        plain.field.flatten(2).transpose(1, 2), tokens[:, 1 + registers :], atol=1e-6, rtol=1e-6
    )


def test_srt_is_a_module_that_can_be_copied_and_cast() -> None:
    """And its model may be replaced."""
    srt = SRT(tiny_vit(), views.grid(1) + 0.3)
    twin = copy.deepcopy(srt).double()
    assert {p.dtype for p in twin.parameters()} == {torch.float64}
    assert {p.dtype for p in srt.parameters()} == {torch.float32}
    assert torch.equal(twin.views, srt.views)
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(
        twin(images.double()).field.float(), srt(images).field, atol=1e-4, rtol=1e-4
    )
    srt.model = tiny_vit(global_pool="avg", class_token=False)
    assert srt(images).prefix is None
