"""Designs of views, and their words."""

import pytest
import torch

from srt_ext import views


def test_grid_is_every_offset_of_the_square() -> None:
    offsets = views.grid(6, step=4)
    assert offsets.dtype == torch.float32
    expected = {(dy, dx) for dy in (-6, -2, 2, 6) for dx in (-6, -2, 2, 6)}
    assert {(int(dy), int(dx)) for dy, dx in offsets.tolist()} == expected
    assert len(offsets) == len(expected)


def test_grid_of_radius_zero_is_the_picture_itself() -> None:
    assert torch.equal(views.grid(0), torch.zeros(1, 2))


def test_paper_counts_the_identity_twice() -> None:
    offsets = views.paper(3)
    assert torch.equal(offsets[0], torch.zeros(2))
    assert torch.equal(offsets[1:], views.grid(3))


@pytest.mark.parametrize("count", [1, 2, 3, 9, 25, 49, 121])
def test_spread_is_a_permutation_whose_parts_spread(count: int) -> None:
    line = torch.stack([torch.zeros(count), torch.arange(count)], 1)
    order = views.spread(line)[:, 1].long().tolist()
    assert sorted(order) == list(range(count))
    for n in (1, count // 3, count // 2):
        # The largest gap between the first n of them is no more than three times the mean one.
        seen = sorted(order[:n])
        gaps = [b - a for a, b in zip([0, *seen], [*seen, count], strict=True)]
        assert max(gaps) <= 3 * count / (n + 1) + 1


def test_spread_of_no_views() -> None:
    assert views.spread(torch.zeros(0, 2)).shape == (0, 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("grid:3", views.grid(3)), ("grid:6:2", views.grid(6, 2)), ("paper:2", views.paper(2))],
)
def test_parse(text: str, expected: torch.Tensor) -> None:
    assert torch.equal(views.parse(text), expected)


@pytest.mark.parametrize(
    "text",
    [
        *("", "grid", "grid:", "grid:x", "grid:-1", "grid:1:2:3", "grid:3:0", "paper:1:2", "x:3"),
        "grid:3:4",  # not centred
        "grid:1000000",
        "grid:99999999999999999999",
    ],
)
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"views"):
        views.parse(text)
