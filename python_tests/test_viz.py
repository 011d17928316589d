"""What ``srt-ext show`` draws: its panels against SRT itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("typer")

import timm
from cli import SMALL, crops, small_weights
from torch.nn.functional import cosine_similarity

from srt_ext import SRT, viz
from srt_ext.backbones import describe
from srt_ext.cli.common import Network
from srt_ext.viz import Comparison, PCAColors, cosine_map


@pytest.fixture(scope="module")
def network() -> Network:
    return Network(SMALL, small_weights(), [2, -1])


@pytest.mark.parametrize("views", ["grid:1.5:1", "ring:5:3"])  # one of them has weights
@pytest.mark.parametrize("view_batch", [1, 4, 100])
def test_fields_are_those_of_srt(network: Network, views: str, view_batch: int) -> None:
    pixels = crops(1, (41, 55))[0]
    image, size = network.image(pixels), pixels.shape[:2]
    comparison = Comparison(network.backbone, views, stride=2, view_batch=view_batch)
    told: list[int] = []
    layers = comparison.tokens(image, told.append)
    assert len(layers) == 2
    assert told == sorted(told)
    assert told[-1] == len(comparison.offsets)
    mean = SRT(network.backbone, views, stride=2)
    median = SRT(network.backbone, mean.views, stride=2, reduce="median")
    alone = SRT(network.backbone, torch.zeros(1, 2), stride=2)
    for i, tokens in enumerate(layers):
        for reduce, srt in {"mean": mean, "median": median, "bilinear": alone}.items():
            field = comparison.field(tokens, reduce, size)
            torch.testing.assert_close(field, srt(image)[i].field)
        expected = mean.moments(image)[i]
        field, noise = comparison.moments(tokens, size)
        torch.testing.assert_close(field, expected.mean)
        torch.testing.assert_close(noise, expected.var[0].sum(0).sqrt())


def test_panels_have_one_basis(network: Network) -> None:
    pixels = crops(1)[0]
    comparison = Comparison(network.backbone, "grid:1", stride=4)
    rows = comparison(network.image(pixels), pixels)
    layers = comparison.tokens(network.image(pixels))
    for row, tokens in zip(rows, layers, strict=True):
        assert [panel.title for panel in row] == [
            "input",
            "plain tokens",
            "tokens, bilinear",
            "SRT mean, 9 views",
            "SRT median",
        ]
        colours = PCAColors(tokens.map)
        expected = [pixels / 255, colours(tokens.map).repeat(16, 0).repeat(16, 1)]
        for reduce in ("bilinear", "mean", "median"):
            field = comparison.field(tokens, reduce, (48, 64))
            expected.append(colours(field).repeat(4, 0).repeat(4, 1))
        for panel, picture in zip(row, expected, strict=True):
            np.testing.assert_allclose(panel.rgb, picture, atol=1e-5)
    assert np.abs(rows[0][3].rgb - rows[1][3].rgb).mean() > 1e-3  # each layer its own


@pytest.mark.parametrize("patch", [8, 14])
def test_pictures_of_no_whole_patches(patch: int) -> None:
    """As those of the default model and of the small one: padded, and the padding cut off."""
    model = timm.models.VisionTransformer(
        img_size=4 * patch,
        patch_size=patch,
        embed_dim=32,
        depth=1,
        num_heads=2,
        dynamic_img_size=True,
    ).eval()
    backbone, pixels = describe(model, [-1]), crops(1, (41, 55))[0]
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255
    comparison = Comparison(backbone, "grid:1")
    assert [panel.rgb.shape for panel in comparison(image, pixels)[0]] == [(41, 55, 3)] * 5
    tokens = comparison.tokens(image)[0]
    assert tokens.grid == (-(-41 // patch), -(-55 // patch))
    expected = SRT(backbone, "grid:1")(image)[0].field
    torch.testing.assert_close(comparison.field(tokens, "mean", (41, 55)), expected)


def test_the_first_picture_fixes_colours_and_ranges(network: Network) -> None:
    a, b = crops(2)
    settings: dict[str, Any] = {"stride": 4, "noise": True, "query": (0.3, 0.4)}
    comparison = Comparison(network.backbone, "grid:1", **settings)
    first = comparison(network.image(a), a)
    second = comparison(network.image(b), b)
    again = comparison(network.image(a), a)
    fresh = Comparison(network.backbone, "grid:1", **settings)(network.image(b), b)
    for row, row_b, row_a, row_fresh in zip(first, second, again, fresh, strict=True):
        assert len(row) == 8
        for panel, same in zip(row, row_a, strict=True):
            assert (panel.rgb == same.rgb).all()
        for panel, other in list(zip(row_b, row_fresh, strict=True))[1:]:
            assert np.abs(panel.rgb - other.rgb).mean() > 1e-3
        assert row[0].point is not None
        assert row_b[0].point is None


def test_weighted_views_say_that_the_median_has_no_weights(network: Network) -> None:
    pixels = crops(1)[0]
    rows = Comparison(network.backbone, "ring:5:3", stride=4)(network.image(pixels), pixels)
    assert rows[0][4].title == "SRT median, unweighted"


def test_cosine_is_that_of_torch() -> None:
    features = torch.randn(1, 5, 3, 4)
    similar = cosine_map(features, features[0, :, 1, 2])
    expected = cosine_similarity(features, features[:, :, 1:2, 2:3], dim=1)[0]
    torch.testing.assert_close(similar, expected)
    assert cosine_map(torch.zeros(1, 5, 3, 4), torch.ones(5)).eq(0).all()


def test_more_than_fits_is_refused(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = crops(1)[0]
    comparison = Comparison(network.backbone, "grid:1", stride=16)
    # 10 x 12 tokens of 64 channels at 2 layers, and twice one of 12.
    needed = 4 * 64 * (10 * 12 * 2 + 2 * 12)
    monkeypatch.setattr(viz, "free_bytes", lambda _device: needed)
    comparison(network.image(pixels), pixels)
    monkeypatch.setattr(viz, "free_bytes", lambda _device: needed - 1)
    with pytest.raises(ValueError, match="smaller --size"):
        comparison(network.image(pixels), pixels)
