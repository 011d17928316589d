"""Published ensembles of views other than SRT: HR-Dv2 and the teacher of PH-Reg."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHARED

import srt_ext
from srt_ext import SRT, views
from srt_ext.views import Views

# ---- HR-Dv2: rolled and mirrored views, nearest upsampling --------------------------------------


@pytest.fixture(scope="module")
def hrdv2() -> dict[str, Any]:
    path = SHARED / "golden" / "hrdv2.npz"
    if not path.exists():
        pytest.skip(f"evaluation data, not in the repository: {path.name}")
    return {key: torch.from_numpy(np.asarray(values)) for key, values in np.load(path).items()}


def design_of(file: dict[str, Any], name: str) -> Views:
    """The design of a set of views, from the positions of the pixel (3, 4) in the views."""
    place, mirror = file[f"{name}_probe"][:, :2], file[f"{name}_probe"][:, [3, 2]].bool()
    size = torch.tensor(file["image"].shape[1:])
    place = torch.where(mirror, size - 1 - place, place)  # before the view was mirrored
    offsets = (place - torch.tensor([3, 4]) + size // 2) % size - size // 2
    return Views(offsets.float(), None, mirror)


def in_order(tokens: torch.Tensor) -> Any:
    """A model that returns the next of the tokens [V, N, C] for each view."""
    rest = list(tokens)

    def model(images: torch.Tensor) -> torch.Tensor:
        return torch.stack([rest.pop(0) for _ in images])

    return model


def field_of(file: dict[str, Any], name: str, design: Any) -> torch.Tensor:
    """The field [C, H, W] by SRT from the tokens of HR-Dv2."""
    patch = int(file["patch"])
    model = in_order(file[f"{name}_tokens"])
    modes: Any = {"padding": "circular", "border": "circular", "upsample": "nearest"}
    field: torch.Tensor = SRT(model, design, patch=patch, prefix=0, **modes)(file["image"][None])[0]
    return field[0]


def by_rolls(file: dict[str, Any], name: str, design: Views, mirrored_first: bool) -> torch.Tensor:
    """The field [C, H, W], float64: pixel maps, mirrored and rolled back in either order."""
    patch, grid = int(file["patch"]), file["grid"].tolist()
    total: Any = 0
    for tokens, offset, mirror in zip(
        file[f"{name}_tokens"].double(), design.offsets.long(), design.mirror, strict=True
    ):
        field = tokens.unflatten(0, grid).movedim(2, 0)
        field = field.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
        axes, back = [i + 1 for i in range(2) if mirror[i]], (-offset).tolist()
        if mirrored_first:
            total = total + field.flip(axes).roll(back, (1, 2))
        else:
            total = total + field.roll(back, (1, 2)).flip(axes)
    return total / len(design.offsets)


def test_designs_equal_those_of_hrdv2(hrdv2: dict[str, Any]) -> None:
    """In the same order; and the views of shift are bitwise equal to those of HR-Dv2."""
    for name, design in (("moore12", views.moore((1, 2))), ("neumann12", views.neumann([1, 2]))):
        assert torch.equal(design.offsets, design_of(hrdv2, name).offsets)
    shifted = srt_ext.shift(hrdv2["image"][None], views.moore((1, 2)).offsets, padding="circular")
    assert torch.equal(shifted[:, 0], hrdv2["moore12_views"])
    mirror = views.flipped(views.grid(0)).mirror, views.flipped(views.grid(0), "y").mirror
    assert torch.equal(torch.cat(mirror), design_of(hrdv2, "flip").mirror)  # type: ignore[arg-type]


def rows(design: Views) -> list[list[float]]:
    return sorted(torch.cat([design.offsets, design.mirror.float()], 1).tolist())  # type: ignore[union-attr]


def test_shifts_and_flips_of_hrdv2_are_two_flipped_designs(hrdv2: dict[str, Any]) -> None:
    shifts = views.moore((1, 2))
    both = [*rows(views.flipped(shifts)), *rows(views.flipped(shifts, "y"))]
    assert sorted(both) == rows(design_of(hrdv2, "moore12_flip"))


@pytest.mark.parametrize("name", ["moore12", "neumann12", "flip"])
def test_fields_equal_those_of_hrdv2(hrdv2: dict[str, Any], name: str) -> None:
    field = field_of(hrdv2, name, design_of(hrdv2, name))
    torch.testing.assert_close(field, hrdv2[f"{name}_field"], rtol=0, atol=1e-6)


def test_mirrored_shifts_are_undone_in_the_right_order(hrdv2: dict[str, Any]) -> None:
    """HR-Dv2 undoes the roll before the mirroring: wrong if both are along one axis."""
    name, design = "moore12_flip", design_of(hrdv2, "moore12_flip")
    right, theirs = (by_rolls(hrdv2, name, design, first).float() for first in (True, False))
    torch.testing.assert_close(hrdv2[f"{name}_field"], theirs, rtol=0, atol=1e-6)
    ours = field_of(hrdv2, name, design)
    torch.testing.assert_close(ours, right, rtol=0, atol=1e-6)
    assert (ours - theirs).abs().max() > 0.1
    # Their order equals ours with offsets negated along the mirrored axis.
    turned = torch.where(design.mirror, -design.offsets, design.offsets)
    wrong = (turned != design.offsets).any(1).nonzero()[:, 0]
    assert torch.equal(wrong, hrdv2["moore12_flip_wrong"])
    assert len(wrong) == 24
    patch, grid = int(hrdv2["patch"]), hrdv2["grid"].tolist()
    tokens = hrdv2[f"{name}_tokens"].unflatten(1, grid)
    pairs = zip(tokens, design.mirror, strict=True)
    back = [tokens.flip([i for i in range(2) if mirror[i]]) for tokens, mirror in pairs]
    args = (torch.stack(back).flatten(1, 2)[:, None], turned, grid, (patch, patch))
    field = srt_ext.ensemble(*args, upsample="nearest", border="circular")
    torch.testing.assert_close(field[0], hrdv2[f"{name}_field"], rtol=0, atol=1e-6)


# ---- PH-Reg: views shifted by whole patches, filled with a colour --------------------------------

PATCH = (8, 4)


def filled(image: torch.Tensor, dy: int, dx: int, fill: torch.Tensor) -> torch.Tensor:
    """image [C, H, W] moved up by dy and left by dx pixels, and filled with ``fill`` [C, 1, 1]."""
    moved = fill.expand_as(image).clone()
    height, width = image.shape[1:]
    for y in range(height):
        for x in range(width):
            if 0 <= y + dy < height and 0 <= x + dx < width:
                moved[:, y, x] = image[:, y + dy, x + dx]
    return moved


def teacher(model: Any, image: torch.Tensor, steps: Any, mirror: Any, fill: Any) -> torch.Tensor:
    """[C, h, w], float64: every token is added to the patch of the image that it shows."""
    h, w = image.shape[1] // PATCH[0], image.shape[2] // PATCH[1]
    total, count = torch.zeros(h, w, 5, dtype=torch.float64), torch.zeros(h, w, 1)
    for (dy, dx), flip in zip(steps, mirror, strict=True):
        view = filled(image, dy * PATCH[0], dx * PATCH[1], fill)
        tokens = model((view.flip(2) if flip else view)[None])[0]
        for i, token in enumerate(tokens):
            y, x = divmod(i, w)
            y, x = y + dy, (w - 1 - x if flip else x) + dx
            if 0 <= y < h and 0 <= x < w:
                total[y, x] += token
                count[y, x] += 1
    return (total / count).movedim(2, 0)


def test_srt_with_patches_equals_the_teacher_of_phreg() -> None:
    """The teacher is written out as loops; its views are shifted by whole patches."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 5, PATCH, stride=PATCH)

    def model(images: torch.Tensor) -> torch.Tensor:  # each token depends on all others
        tokens = conv(images).flatten(2).transpose(1, 2)
        place = torch.linspace(-1, 1, tokens.shape[1])[:, None]
        return (tokens + (place * tokens).mean(1, keepdim=True)).tanh().detach()  # type: ignore[no-any-return]

    image, fill = torch.randn(3, 40, 28), torch.tensor([1.9, 2.1, 2.2])[:, None, None]
    design = views.patches(8, (5, 7), 0.4, seed=1, patch=PATCH)
    flip = torch.rand(8) < 0.5
    flip[0] = False
    assert flip.any()
    steps = (
        (-design.offsets / torch.tensor(PATCH)).long().tolist()
    )  # the offsets of PH-Reg have the opposite sign
    expected = teacher(model, image, steps, flip, fill)
    mirror = torch.stack([torch.zeros_like(flip), flip], 1)
    modes: Any = {"padding": "zeros", "border": "coverage", "upsample": "nearest"}
    srt = SRT(
        lambda x: model(x + fill),
        Views(design.offsets, None, mirror),
        patch=PATCH,
        stride=PATCH,
        prefix=0,
        **modes,
    )
    field, _ = srt((image - fill)[None])
    # The teacher sums the same tokens in another order, in float32.
    torch.testing.assert_close(field[0], expected.float(), rtol=1e-5, atol=1e-5)
