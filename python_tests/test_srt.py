"""SRT around small exact models: its fields equal the oracle, for all forms of views."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from process import needs_proc, peak_of

import srt_ext
from srt_ext import SRT, reference, views
from srt_ext import srt as srt_module

PATCH = (8, 4)


def pooled(images: torch.Tensor) -> torch.Tensor:
    """A model whose tokens are the means of patches: [B, 3, H, W] -> [B, h * w, 3]."""
    return F.avg_pool2d(images, PATCH).flatten(2).transpose(1, 2)


def with_prefix(images: torch.Tensor) -> torch.Tensor:
    """Two prefix tokens, the mean of the image and ones, before the patches."""
    mean = images.mean((2, 3))[:, None]
    return torch.cat([mean, torch.ones_like(mean), pooled(images)], 1)


@pytest.mark.parametrize(
    ("stride", "view_batch", "border"),
    [
        (1, 49, "coverage"),  # all at once
        (1, 4, "zeros"),  # batches, one ensemble
        (PATCH, 4, "coverage"),  # token scale: parts of one batch
        (PATCH, 4, "clamp"),
        ((2, 2), 3, "zeros"),  # parts of several batches, the last one short
        ((40, 20), 1, "coverage"),  # one cell
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_views_in_batches_equal_the_oracle(
    stride: Any, view_batch: int, border: str, streaming: bool
) -> None:
    images = torch.randn(2, 3, 40, 20, generator=torch.Generator().manual_seed(0))
    offsets = torch.cat([views.grid(3).offsets, torch.tensor([[0.4, -1.7], [21.0, 3.0]])])
    settings: dict[str, Any] = {"stride": stride, "view_batch": view_batch, "border": border}
    srt = SRT(with_prefix, offsets, patch=PATCH, prefix=2, streaming=streaming, **settings)
    field, prefix = srt(images)
    tokens = torch.stack([with_prefix(view.float()) for view in reference.shift(images, offsets)])
    modes = {"border": border, "stride": srt.stride}
    expected = reference.ensemble(tokens[:, :, 2:], offsets, (5, 5), PATCH, **modes)
    torch.testing.assert_close(field, expected.float())
    torch.testing.assert_close(prefix, tokens[:, :, :2].mean(0))


@pytest.mark.parametrize("weighted", [False, True])
def test_tokens_are_those_of_the_model_for_each_view(weighted: bool) -> None:
    """Batches of equal size, in the order of the views, dense, and without gradients."""
    conv = torch.nn.Conv2d(3, 6, PATCH, stride=PATCH)  # a map: its tokens are not dense
    offsets = views.grid(1).offsets
    weights = torch.arange(9.0) if weighted else None
    images = torch.randn(2, 3, 37, 20)
    srt = SRT(conv, (offsets, weights), patch=PATCH, view_batch=4)  # type: ignore[arg-type]
    batches = list(srt.tokens(images))
    assert [len(batch.offsets) for batch in batches] == [3, 3, 3]
    assert torch.equal(torch.cat([batch.offsets for batch in batches]), offsets)
    if weighted:
        assert torch.equal(torch.cat([batch.weights for batch in batches]), weights)
    else:
        assert all(batch.weights is None for batch in batches)
    shifted = srt_ext.shift(F.pad(images, (0, 0, 0, 3), mode="replicate"), offsets)
    expected = conv(shifted.flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, (9, 2))
    torch.testing.assert_close(torch.cat([b.layers[0].tokens for b in batches]), expected)
    for batch in batches:
        (layer,) = batch.layers
        assert (layer.grid, layer.patch, layer.prefix) == ((5, 5), PATCH, None)
        assert layer.tokens.stride(3) == 1
        assert not layer.tokens.requires_grad
    with pytest.raises(ValueError, match="images must be"):
        srt.tokens(torch.zeros(3, 8, 8))  # before the first batch is requested


@pytest.mark.parametrize(("height", "width"), [(37, 19), (1, 1), (33, 20)])
@pytest.mark.parametrize("stride", [1, (2, 4), PATCH])
def test_any_size_is_padded_and_cropped_back(height: int, width: int, stride: Any) -> None:
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
    """At token scale, or streaming, only the tokens of one batch of views are held."""
    held: list[int] = []
    kind = srt_module._RUNNING[reduce]
    update = kind.update

    def spy(running: Any, tokens: torch.Tensor, *others: torch.Tensor | None) -> None:
        held.append(tokens.untyped_storage().nbytes())
        update(running, tokens, *others)

    monkeypatch.setattr(kind, "update", spy)
    for radius in (1, 4):
        settings: dict[str, Any] = {"stride": PATCH, "view_batch": 3, "patch": PATCH}
        srt = SRT(
            pooled, views.grid(radius).offsets, reduce=reduce, streaming=streaming, **settings
        )
        srt(torch.randn(1, 3, 40, 20))
    if reduce == "median" and not streaming:
        assert not held  # an exact median holds all tokens
    else:
        assert max(held) == 3 * 25 * 3 * 4  # views * tokens * channels * bytes


def test_median_and_moments_equal_those_of_the_ops() -> None:
    images = torch.randn(1, 3, 40, 20)
    offsets = views.grid(2).offsets
    tokens = torch.stack([pooled(view) for view in srt_ext.shift(images, offsets)])
    args = (tokens, offsets, (5, 5), PATCH)
    srt = SRT(pooled, offsets, patch=PATCH, reduce="median")
    assert torch.equal(srt(images).field, srt_ext.ensemble(*args, reduce="median"))
    moments = srt.moments(images)
    assert all(map(torch.equal, moments[:2], srt_ext.ensemble_moments(*args)))
    assert moments.prefix is None
    streamed = SRT(pooled, offsets, patch=PATCH, streaming=True).moments(images)
    torch.testing.assert_close(streamed, moments)


def test_a_streamed_median_is_close() -> None:
    """SRT spreads the views, because a stream in raster order would drift."""
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
    return SRT(model, views.grid(radius).offsets, stride=2, view_batch=2, patch=8)(image).field

image = torch.ones(1, 3, 64, 64)
field(0)
"""


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("radius", [4, 8])
def test_peak_memory_is_two_outputs_and_a_batch(radius: int) -> None:
    """The tokens of 81 views are 5 times the output, those of 289 views 18 times."""
    right = "((result - 1).abs() < 1e-5).all()"
    taken, output = peak_of(MEMORY, f"field({radius})", right)
    assert 2 * output <= taken < 2.25 * output


ORIGIN = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"patch": None}, ValueError, "patch must be given"),
        ({"patch": 0}, ValueError, "patch must be an integer or a pair"),
        ({"patch": "8"}, TypeError, "patch must be an integer or a pair"),
        ({"prefix": -1}, ValueError, "prefix must be an integer >= 0; got -1"),
        ({"prefix": 1.0}, TypeError, "prefix must be an integer >= 0; got 1.0"),
        ({"stride": (2,)}, ValueError, "stride must be an integer or a pair"),
        ({"stride": 2.0}, TypeError, "stride must be an integer or a pair .*; got 2.0"),
        ({"view_batch": 0}, ValueError, "view_batch must be an integer >= 1, or 'auto'; got 0"),
        ({"view_batch": 2.5}, TypeError, "view_batch must be an integer >= 1, or 'auto'; got 2.5"),
        ({"border": "mirror"}, ValueError, "border must be one of .*; got 'mirror'"),
        ({"border": None}, TypeError, "border must be a string"),
        ({"padding": "mirror"}, ValueError, "padding must be one of"),
        # Views are checked before the model runs; test_views.py has the rest.
        (
            {"views": torch.tensor([[0.0, torch.nan]])},
            ValueError,
            "offsets of views must be finite",
        ),
        (
            {"views": (ORIGIN, torch.tensor([1.0, -1]))},
            ValueError,
            "weights of views must be fini",
        ),
        ({"views": (ORIGIN, torch.zeros(2))}, ValueError, r"not all be 0; got \[0.0, 0.0\]"),
    ],
)
def test_wrong_settings_raise(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        SRT(pooled, **{"patch": PATCH, "views": 4, **arguments})


def test_the_text_of_a_module_has_the_settings() -> None:
    settings: dict[str, Any] = {"stride": (1, 2), "reduce": "median", "padding": "zeros"}
    text = SRT(pooled, "grid:1+flip", patch=PATCH, **settings).extra_repr()
    expected = "views=18, scale=1.0, stride=(1, 2), reduce='median', upsample='bilinear'"
    assert text == f"{expected}, padding='zeros'"
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 4, stride=4), torch.nn.Identity())
    assert "inject='0'" in repr(SRT(model, 4, patch=4, inject="0"))


def test_wrong_inputs_raise() -> None:
    for model, settings, images, message in (
        (pooled, {}, torch.zeros(3, 8, 8), "images must be"),
        (pooled, {}, torch.zeros(1, 8, 8, 3), r"channels before pixels; got \[1, 8, 8, 3\]"),
        (pooled, {}, torch.zeros(1, 3, 0, 8), "must have pixels"),
        (with_prefix, {"prefix": 1}, torch.zeros(1, 3, 8, 8), "the model must return tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            SRT(model, 4, patch=PATCH, **settings)(images)
    with pytest.raises(TypeError, match="callable"):
        SRT(3, patch=PATCH)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"images must be floating-point, .*; got torch.uint8"):
        SRT(pooled, 4, patch=PATCH)(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"images must be a torch.Tensor; got list"):
        SRT(pooled, 4, patch=PATCH)([[0.0]])


def test_views_of_weight_0_do_not_affect_the_field() -> None:
    def fails_to_the_right(images: torch.Tensor) -> torch.Tensor:
        tokens = with_prefix(images)
        tokens[images[:, 0, 0, 0] == 0] = torch.inf
        return tokens

    design = (torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.tensor([2.0, 0.0]))
    srt = SRT(fails_to_the_right, design, patch=PATCH, prefix=2, padding="zeros")
    field, prefix = srt(torch.ones(1, 3, 16, 8))
    assert torch.equal(field, torch.ones(1, 3, 16, 8))
    assert torch.equal(prefix, torch.ones(1, 2, 3))


def test_srt_is_a_module_that_can_be_copied_and_cast() -> None:
    """Its model can also be replaced."""
    srt = SRT(torch.nn.Conv2d(3, 4, PATCH, stride=PATCH), views.grid(1).offsets + 0.3, patch=PATCH)
    twin = copy.deepcopy(srt).double()
    assert {p.dtype for p in twin.parameters()} == {torch.float64}
    assert {p.dtype for p in srt.parameters()} == {torch.float32}
    assert torch.equal(twin.views.offsets, srt.views.offsets)
    images = torch.randn(1, 3, 32, 32)
    field = twin(images.double()).field.float()
    torch.testing.assert_close(field, srt(images).field, atol=1e-4, rtol=1e-4)
    srt.model = torch.nn.Conv2d(3, 5, PATCH, stride=PATCH)
    assert srt(images).field.shape == (1, 5, 32, 32)


@pytest.mark.parametrize("scale", [1, 1.5])
@pytest.mark.parametrize(
    "form", ["tensor", "pair", "triple", "Views", "design and weights", "float64"]
)
def test_later_changes_of_given_views_have_no_effect(form: str, scale: float) -> None:
    """SRT copies the views that it validated, and returns copies of them."""
    design = views.flipped(views.ring(5, 3))
    offsets, weights, mirror = (part.clone() for part in design)  # type: ignore[union-attr]
    offsets = offsets.double() if form == "float64" else offsets
    given: Any = {
        "tensor": offsets,
        "float64": offsets,
        "pair": (offsets, weights),
        "triple": (offsets, weights, mirror),
        "Views": views.Views(offsets, weights, mirror),
        "design and weights": (views.Views(offsets), weights),
    }[form]
    images = torch.rand(1, 3, 32, 20)
    srt = SRT(with_prefix, given, patch=PATCH, prefix=2, scale=scale)
    expected, seen = srt(images), srt.views

    def unchanged() -> None:
        assert all(map(torch.equal, srt(images), expected))
        for part, before in zip(srt.views, seen_copy, strict=True):
            assert part is before is None or torch.equal(part, before)

    seen_copy = tuple(part if part is None else part.clone() for part in seen)
    offsets.mul_(6)
    weights.zero_()
    mirror.logical_not_()
    unchanged()
    for part in seen:
        if part is not None:
            part.zero_()
    unchanged()
    for batch in srt.tokens(images):
        batch.offsets.add_(7)
        if batch.weights is not None:
            batch.weights.zero_()
    unchanged()
    srt.model = lambda images: with_prefix(images)
    unchanged()


def test_later_changes_of_a_given_scale_have_no_effect() -> None:
    scale = torch.tensor(1.5)
    srt = SRT(with_prefix, 4, scale=scale, patch=PATCH, prefix=2)  # type: ignore[arg-type]
    scale.mul_(2)
    srt.model = lambda images: with_prefix(images)
    assert srt(torch.rand(1, 3, 32, 20)).field.shape[-2:] == (32, 20)
    assert srt.scale == 1.5


def test_later_changes_of_given_lists_have_no_effect() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Conv2d(3, 4, PATCH, stride=PATCH)
            self.second = torch.nn.Conv2d(4, 5, 1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(images))

    layers, stride, patch = ["first", "second"], [2, 4], list(PATCH)
    srt = SRT(Two(), 4, layers=layers, stride=stride, patch=patch)
    layers[:], stride[:], patch[:] = ["second"], [1, 1], [1, 1]
    images = torch.rand(1, 3, 32, 20)
    for _ in range(2):
        assert [field.shape for field, _ in srt(images)] == [(1, 4, 16, 5), (1, 5, 16, 5)]
        srt.model = Two()  # it is described with the same settings
