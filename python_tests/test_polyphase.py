"""The anchor of an image: golden outputs, and equivariance to rolls of the image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHARED
from hypothesis import given
from hypothesis import strategies as st

import srt_ext
from srt_ext.polyphase import unique_anchor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8)


def image_of(dtype: torch.dtype, batch: int = 2) -> torch.Tensor:
    """Random images [B, 3, 12, 15]."""
    generator = torch.Generator().manual_seed(batch)
    return (255 * torch.rand(batch, 3, 12, 15, generator=generator)).to(dtype)


def test_golden() -> None:
    """Offsets of the published code for images and windows of tokens; one image has a tie."""
    path = SHARED / "golden" / "polyphase.npz"
    if not path.exists():
        pytest.skip(f"evaluation data, not in the repository: {path.name}")
    file = {key: torch.from_numpy(values) for key, values in np.load(path).items()}
    patch = file["patch"].tolist()
    for full, offset, output in (
        (False, "offset", "out"),
        (True, "offset_invariant", "out_invariant"),
    ):
        found = srt_ext.polyphase(file["image"], patch, full=full)
        assert torch.equal(found, file[offset])
        pairs = zip(file["image"], (-found).tolist(), strict=True)
        rolled = [image.roll(back, (1, 2)) for image, back in pairs]
        assert torch.equal(torch.stack(rolled), file[output])
    assert torch.equal(srt_ext.polyphase(file["tokens"], 7), file["tokens_offset"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("full", [False, True])
def test_the_anchor_has_the_largest_energy(dtype: torch.dtype, full: bool) -> None:
    """Computed by loops over all phases and positions, with exact integers."""
    image, (height, width) = image_of(dtype), (4, 5)
    squares = image.double().square().sum(1)
    offsets = []
    for energy in squares.tolist():
        phases = [
            sum(sum(row[x::width]) for row in energy[y::height])
            for y in range(height)
            for x in range(width)
        ]
        y, x = divmod(phases.index(max(phases)), width)
        if full:
            places = [
                (energy[i][j], -i, -j) for i in range(y, 12, height) for j in range(x, 15, width)
            ]
            y, x = (-i for i in max(places)[1:])
        offsets.append([y, x])
    found = srt_ext.polyphase(image, (height, width), full=full)
    assert found.dtype == torch.int64
    assert found.tolist() == offsets


@given(st.integers(-40, 40), st.integers(-40, 40), st.sampled_from(DTYPES))
def test_the_anchor_moves_with_the_content(dy: int, dx: int, dtype: torch.dtype) -> None:
    """Modulo the patch, or with ``full`` modulo the image; for any memory layout."""
    image, patch = image_of(dtype), torch.tensor([4, 5])
    size = torch.tensor(image.shape[2:])
    rolled = image.roll((dy, dx), (2, 3)).contiguous(memory_format=torch.channels_last)
    for full, period in ((False, patch), (True, size)):
        before = srt_ext.polyphase(image, patch.tolist(), full=full)
        after = srt_ext.polyphase(rolled, patch.tolist(), full=full)
        assert torch.equal((before + torch.tensor([dy, dx])) % period, after)


@given(st.integers(-40, 40), st.integers(-40, 40), st.floats(0.02, 0.5))
def test_ties_of_saturated_pixels_are_resolved_by_the_rest_of_the_image(
    dy: int, dx: int, top: float
) -> None:
    """By ``unique_anchor`` of SRT, which equals polyphase if the maximum is unique."""
    image = torch.rand(2, 3, 12, 15, generator=torch.Generator().manual_seed(0))
    flat, size = image.clamp(max=top), torch.tensor([12, 15])
    before, after = (unique_anchor(i, (4, 5)) for i in (flat, flat.roll((dy, dx), (2, 3))))
    assert (flat == top).all(1).sum() > 10
    assert torch.equal((before + torch.tensor([dy, dx])) % size, after)
    assert torch.equal(unique_anchor(image, (4, 5)), srt_ext.polyphase(image, (4, 5), full=True))
    # A constant image looks the same from every anchor.
    assert unique_anchor(torch.ones(2, 3, 12, 15), (4, 5)).tolist() == [[0, 0], [0, 0]]


def test_the_first_of_equal_energies_is_selected() -> None:
    for full in (False, True):
        assert srt_ext.polyphase(torch.ones(2, 3, 8, 8), 4, full=full).tolist() == [[0, 0], [0, 0]]
    image = torch.zeros(1, 1, 4, 6)
    image[..., 1, 5] = image[..., 2, 1] = 1  # phases (1, 2) and (0, 1)
    assert srt_ext.polyphase(image, (2, 3)).tolist() == [[0, 1]]
    assert srt_ext.polyphase(image, (2, 3), full=True).tolist() == [[2, 1]]
    assert srt_ext.polyphase(torch.ones(0, 3, 8, 8), 4, full=True).shape == (0, 2)


@pytest.mark.parametrize("full", [False, True])
def test_polyphase_supports_vmap_and_compile_without_a_gradient(full: bool) -> None:
    images = torch.stack([image_of(torch.float32, 2), image_of(torch.float32, 2).flip(3)])

    def anchor(image: torch.Tensor) -> torch.Tensor:
        return srt_ext.polyphase(image, (4, 5), full=full)

    expected = torch.stack([anchor(image) for image in images])
    assert torch.equal(torch.vmap(anchor)(images), expected)
    compiled = torch.compile(anchor, fullgraph=True, backend="eager")
    assert torch.equal(compiled(images[0]), expected[0])
    assert not anchor(images[0].requires_grad_()).requires_grad
    assert anchor(images[0].to("meta")).shape == (2, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((image_of(torch.float32)[0], 4), ValueError, r"4 dimensions, \[B, C, H, W\]; got \[3, 12"),
        (
            (image_of(torch.float32), 5),
            ValueError,
            r"multiples of patch = \[5, 5\].*got \[12, 15\]",
        ),
        ((torch.zeros(1, 3, 0, 8), 4), ValueError, r"and > 0; got \[0, 8\]"),
        ((image_of(torch.float32), 0), ValueError, "patch must be an integer or a pair"),
        (
            (image_of(torch.float32), 1.5),
            TypeError,
            "patch must be an integer or a pair.*got 1.5",
        ),
        ((image_of(torch.int64), 1), TypeError, "must be floating-point or uint8; got torch.int64"),
        (([[0.0]], 1), TypeError, "image must be a torch.Tensor; got list"),
        ((image_of(torch.float32), 1, "full"), TypeError, "full must be True or False; got 'full'"),
    ],
)
def test_wrong_arguments_raise(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"srt_ext.polyphase: .*{message}"):
        srt_ext.polyphase(*arguments)
