"""The panels of ``srt-ext show``, against SRT."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cli import SMALL, crops, small_weights

from srt_ext import SRT, viz
from srt_ext.extraction import Network
from srt_ext.viz import Comparison, PCAColors


@pytest.fixture(scope="module")
def network() -> Network:
    return Network.load(SMALL, small_weights(), [2, -1])


@pytest.mark.parametrize(
    ("views", "scale", "view_batch"),
    [("grid:1.5:1", 1, 1), ("ring:5:3", 1, 4), ("grid:1.5:1", 1.25, 100), ("ring:5:3+flip", 2, 4)],
)
def test_fields_equal_those_of_srt(
    network: Network, views: str, scale: float, view_batch: int
) -> None:
    pixels = crops(1, (41, 55))[0]
    image = network.image(pixels)
    settings: Any = {"stride": 2, "scale": scale}
    comparison = Comparison(network.backbone, views, view_batch=view_batch, **settings)
    told: list[int] = []
    layers = comparison.tokens(image, told.append)
    assert len(layers) == 2
    assert told == sorted(told)
    mean = SRT(network.backbone, views, **settings)
    assert told[-1] == len(mean.views.offsets)
    unweighted = mean.views._replace(weights=None)
    median = SRT(network.backbone, unweighted, reduce="median", **settings)
    alone = SRT(network.backbone, torch.zeros(1, 2), stride=2)
    for i, layer in enumerate(layers):
        for reduce, srt in {"mean": mean, "median": median, "bilinear": alone}.items():
            field = comparison.field(layer, reduce)
            torch.testing.assert_close(field, srt(image)[i].field)
        expected = mean.moments(image)[i]
        field, noise = comparison.moments(layer)
        torch.testing.assert_close(field, expected.mean)
        torch.testing.assert_close(noise, expected.var[0].sum(0).sqrt())


@pytest.mark.parametrize(
    ("views", "count", "median"),
    [("grid:1", 9, "SRT median"), ("ring:5:3", 5, "SRT median, unweighted")],
)
def test_panels_have_one_basis(network: Network, views: str, count: int, median: str) -> None:
    """And the size of the image: the padding to whole patches is cropped."""
    pixels = crops(1, (41, 55))[0]
    comparison = Comparison(network.backbone, views, stride=4)
    rows = comparison(network.image(pixels), pixels)
    layers = comparison.tokens(network.image(pixels))
    means = f"SRT mean, {count} views"
    for row, layer in zip(rows, layers, strict=True):
        titles = ["input", "plain tokens", "tokens, bilinear", means, median]
        assert [panel.title for panel in row] == titles
        plain = layer.plain.map
        colours = PCAColors(plain)
        expected = [pixels / 255, colours(plain).repeat(16, 0).repeat(16, 1)]
        for reduce in ("bilinear", "mean", "median"):
            field = comparison.field(layer, reduce)
            expected.append(colours(field).repeat(4, 0).repeat(4, 1))
        for panel, picture in zip(row, expected, strict=True):
            np.testing.assert_allclose(panel.rgb, picture[:41, :55], atol=1e-5)
    assert np.abs(rows[0][3].rgb - rows[1][3].rgb).mean() > 1e-3  # the layers differ


def test_the_first_image_fixes_colours_and_ranges(network: Network) -> None:
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


def test_fields_that_exceed_the_free_memory_raise(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = crops(1)[0]
    comparison = Comparison(network.backbone, "grid:1", stride=16)
    # 10 x 12 tokens of 64 channels at 2 layers, and twice one of 12.
    needed = 4 * 64 * (10 * 12 * 2 + 2 * 12)
    monkeypatch.setattr(viz, "free_bytes", lambda _device: needed)
    comparison(network.image(pixels), pixels)
    monkeypatch.setattr(viz, "free_bytes", lambda _device: needed - 1)
    with pytest.raises(ValueError, match="smaller --size"):
        comparison(network.image(pixels), pixels)
