"""The command ``srt-ext spot``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cli import SMALL, crops, run, small_weights
from PIL import Image

from srt_ext import spot, viz


class Drawn(NamedTuple):
    pixels: np.ndarray
    centers: torch.Tensor
    patch: tuple[int, int]
    path: torch.Tensor | None


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Drawn]:
    """A list that records the arguments of every drawn figure."""
    kept, draw = [], viz.draw_windows

    def keep(*arguments: Any) -> Any:
        kept.append(Drawn(*arguments))
        return draw(*arguments)

    monkeypatch.setattr(viz, "draw_windows", keep)
    return kept


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(crops(1, (50, 70))[0]).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def draw(photo: Path, *options: object) -> str:
    """Runs ``srt-ext spot`` for a small model; writes out.png next to the photograph."""
    output = photo.with_name("out.png")
    return run(
        "spot", photo, "-o", output, "--model", SMALL, "--weights", small_weights(), *options
    )


def cosines(text: str) -> list[float]:
    line = next(line for line in text.splitlines() if line.startswith("cosine"))
    return [float(number) for number in re.findall(r"-?\d+\.\d+", line)]


def test_the_windows_are_drawn_on_whole_patches(photo: Path, drawn: list[Drawn]) -> None:
    text = draw(photo, "--tokens", 6)
    assert "image 70 x 50 pixels (width x height), cropped to 64 x 48" in text
    assert "6 windows of 16 x 16, isotropic" in text
    assert "to the output for all 12 patches: " in text
    assert f"wrote {photo.with_name('out.png')}" in text
    assert -1 <= cosines(text)[0] < 0.999
    figure = np.asarray(Image.open(photo.with_name("out.png")).convert("RGB"))
    assert figure.shape[1] / figure.shape[0] == pytest.approx(64 / 48, abs=0.01)
    (found,) = drawn
    np.testing.assert_array_equal(found.pixels, crops(1)[0])
    assert torch.equal(found.centers, spot.isotropic(6, (48, 64)))
    assert found.patch == (16, 16)
    assert found.path is None


@pytest.mark.parametrize("name", ["uniform", "gauss", "sobol", "center", "edge"])
def test_placements_by_name(photo: Path, drawn: list[Drawn], name: str) -> None:
    draw(photo, "--tokens", 5, "--placement", name, "--seed", 3)
    assert torch.equal(drawn[0].centers, spot.PLACEMENTS[name](5, (48, 64), 3))


def test_all_patches_give_the_output_of_the_model(photo: Path, drawn: list[Drawn]) -> None:
    assert cosines(draw(photo, "--tokens", 12, "--placement", "grid")) == [1.0]
    draw(photo, "--tokens", 5, "--placement", "grid", "--seed", 2)
    assert torch.equal(drawn[1].centers, spot.grid(5, (48, 64), 16, 2))


def test_salient_follows_the_gradient_or_a_mask(tmp_path: Path, drawn: list[Drawn]) -> None:
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[16:32, 40:] = 255
    photo, mask = tmp_path / "photo.png", tmp_path / "mask.png"
    Image.fromarray(pixels).save(photo)
    Image.fromarray(255 - pixels[::2, ::2]).save(mask)  # scaled to the photograph
    draw(photo, "--placement", "salient", "--tokens", 40)
    y, x = drawn[0].centers.T
    on_a_row = ((y - 16).abs() <= 1) | ((y - 32).abs() <= 1)
    assert (((x - 40).abs() <= 1) | (on_a_row & (x > 38))).all()
    draw(photo, "--placement", "salient", "--tokens", 40, "--mask", mask)
    y, x = drawn[1].centers.T
    assert not ((y > 18) & (y < 30) & (x > 42)).any()
    assert (y < 14).any()
    assert (x < 38).any()


def test_the_search_draws_the_path_to_the_best_positions(photo: Path, drawn: list[Drawn]) -> None:
    before, after = cosines(text := draw(photo, "--tokens", 4, "--search", 3, "--lr", 2))
    assert after > before
    (found,) = drawn
    assert found.path is not None
    assert torch.equal(found.path[0], spot.isotropic(4, (48, 64)))
    assert torch.equal(found.path[-1], found.centers)
    assert f"after {len(found.path) - 1} of 3 steps" in text
    assert (found.path[1] - found.path[0]).abs().max() < 3


def test_windows_and_paths_are_drawn_at_their_pixels() -> None:
    """imshow places the centre of the first pixel at 0."""
    path = torch.tensor([[[4.0, 4]], [[20, 24]]])
    figure = viz.draw_windows(crops(1)[0], path[1], (8, 16), path)
    (axes,) = figure.axes
    for window in axes.patches:
        assert (window.get_xy(), window.get_height(), window.get_width()) == ((15.5, 15.5), 8, 16)
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[3.5, 3.5], [23.5, 19.5]])
    assert axes.get_xlim() == (-0.5, 63.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("missing.png", "missing.png does not exist"),
        ("photo.png -o out.gif", "--output must end in .png"),
        ("photo.png -o photo.png", "--output must not be an input image"),
        ("photo.png --mask photo.png", "--mask requires --placement salient; got isotropic"),
        ("photo.png --placement salient --mask no.png", "no.png does not exist"),
        ("photo.png --model test_convnext", "--model test_convnext: spot.Subpixel: model must"),
        ("photo.png SMALL --placement grid", "n must be <= 12, the number of [16, 16] patches"),
        ("photo.png SMALL --size 12", "at least one patch of 16 x 16 pixels; got 12 x 9"),
        ("photo.png --search 1 --lr 0", "--lr must be > 0, and finite; got 0.0"),
        ("flat.png SMALL --placement salient", "the image has no gradient; use another"),
        (
            "photo.png SMALL --placement salient --mask black.png",
            "--mask black.png must not be black",
        ),
    ],
)
def test_an_error_is_one_line_and_nothing_is_written(
    options: str, message: str, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photo.parent)
    Image.new("RGB", (32, 32), "grey").save("flat.png")
    Image.new("RGB", (32, 32)).save("black.png")
    files = sorted(photo.parent.iterdir())
    words = options.replace("SMALL", f"--model {SMALL} --weights {small_weights()}").split()
    if "test_convnext" in words:
        import timm
        from safetensors.torch import save_file

        path = small_weights().with_name("convnext.safetensors")
        save_file(timm.create_model("test_convnext").state_dict(), path)
        words += ["--weights", str(path)]
    text = run("spot", *words, code=1)
    assert text.count("error: ") == 1
    assert message in text
    assert sorted(photo.parent.iterdir()) == files


def test_lr_is_ignored_without_a_search(photo: Path, drawn: list[Drawn]) -> None:
    draw(photo, "--tokens", 4, "--lr", 0)
    assert torch.equal(drawn[0].centers, spot.isotropic(4, (48, 64)))
