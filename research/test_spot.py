"""The study of sub-pixel tokens: what it compares, and its tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer

pytest.importorskip("timm")
pytest.importorskip("skimage")

from timm.models.vision_transformer import VisionTransformer

from benchmarks.common import load
from research import RESULTS, spot


@pytest.fixture(scope="module")
def pictures() -> spot.Pictures:
    """Crops of a photograph, for a small ViT with random weights."""
    from skimage import data

    torch.manual_seed(0)
    settings: Any = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = VisionTransformer(num_classes=9, dynamic_img_size=True, **settings).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    photo = torch.from_numpy(data.chelsea())
    pixels = torch.stack(
        [photo[y : y + 32, x : x + 32] for y in (0, 90, 180) for x in range(0, 400, 40)]
    )
    pixels = pixels.permute(0, 3, 1, 2)
    return spot.Pictures(model, pixels, pixels / 127.5 - 1)


def test_with_all_patches_each_way_decides_as_the_model(pictures: spot.Pictures) -> None:
    assert len(pictures.labels.unique()) > 1
    assert pictures.of_windows("isotropic", 16, 0) == 1
    assert pictures.of_windows(spot.PATCHES, 16, 0) == 1
    assert pictures.reduced(16) == 1
    assert pictures.search(16)["agreement"] == [1]


def test_rows_have_each_method_and_seed(pictures: spot.Pictures) -> None:
    rows = spot.measure(pictures, (4,), seeds=2)
    share = {row["method"]: row["agreement"] for row in rows}
    assert list(share) == list(spot.METHODS)
    assert {name for name, found in share.items() if len(found) == 2} == spot.RANDOM
    assert all(0 <= value <= 1 for found in share.values() for value in found)
    search = rows[0]
    assert search["steps"]["agreement"][0] == pytest.approx(share["isotropic"][0])
    assert len(search["steps"]["loss"]) == spot.STEPS + 1
    assert search["agreement"][0] >= share["isotropic"][0]


def test_pictures_have_positions_of_their_own(pictures: spot.Pictures) -> None:
    for method in spot.RANDOM:
        one, same, other = (pictures.positions(method, 5, seed) for seed in (0, 0, 1))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
        assert not torch.equal(one[0], one[1])


def test_crops_are_the_middle_of_frames_spread_over_all(tmp_path: Path) -> None:
    from PIL import Image

    for i in range(5):
        pixels = np.zeros((240, 300, 3), np.uint8)
        pixels[8:232, 38:262] = 50 * i
        Image.fromarray(pixels).save(tmp_path / f"{i}.jpg", quality=100, subsampling=0)
    names, found = spot.crops([tmp_path], 3)
    assert [name[-1] for name in names] == ["0", "2", "4"]
    assert found.shape == (3, 3, 224, 224)
    assert (found.float().mean((1, 2, 3)) - torch.tensor([0.0, 100, 200])).abs().max() < 1
    Image.new("RGB", (223, 300)).save(tmp_path / "9.jpg")
    with pytest.raises(typer.BadParameter, match=r"at least 224 x 224 pixels; got .*9.jpg"):
        spot.crops([tmp_path], 6)
    with pytest.raises(typer.BadParameter, match=r"must contain .jpg frames"):
        spot.crops([tmp_path / "none"], 1)


def test_the_tables_are_made_of_the_committed_results(tmp_path: Path) -> None:
    results = load(RESULTS / "spot.json")
    text = spot.document(results)
    assert text == (RESULTS / "spot.md").read_text()
    share = spot.shares(results)
    for name in spot.METHODS:
        for n in spot.COUNTS:
            assert f"{share[name, n]:.3f}" in text
    spot.plot(results, tmp_path / "spot.svg")
    assert (tmp_path / "spot.svg").stat().st_size > 10_000
