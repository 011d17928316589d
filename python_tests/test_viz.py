"""What ``srt-ext show`` draws: its panels against SRT itself, and the command's pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("typer")

import timm
from cli import SMALL, run, small_weights
from PIL import Image
from skimage import data
from torch.nn.functional import cosine_similarity

from srt_ext import SRT, viz
from srt_ext.backbones import describe
from srt_ext.cli.common import Network
from srt_ext.viz import Comparison, Panel, PCAColors, cosine_map

FAST = ("--views", "grid:1", "--stride", 4, "--size", 64, "--model", SMALL)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_weights(tmp_path_factory.mktemp("weights") / "small.safetensors")


@pytest.fixture(scope="session")
def network(weights: Path) -> Network:
    return Network(SMALL, weights, [2, -1])


def crops(count: int, size: tuple[int, int] = (48, 64)) -> list[np.ndarray]:
    """Different parts of a photograph."""
    photo = data.chelsea()
    return [photo[40 * i : 40 * i + size[0], 60 * i : 60 * i + size[1]] for i in range(count)]


def ignore(_done: int) -> None:
    pass


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[list[Panel]]]:
    """The rows of every picture that is drawn."""
    kept, draw = [], viz.draw

    def keep(rows: Any, names: Any) -> Any:
        kept.append(rows)
        return draw(rows, names)

    monkeypatch.setattr(viz, "draw", keep)
    return kept


# ---- fields -------------------------------------------------------------------------------------


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


# ---- the command --------------------------------------------------------------------------------


def test_a_row_for_each_layer(weights: Path, tmp_path: Path, drawn: Any) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(crops(1)[0]).save(photo)
    sizes = []
    for layers in ([], ["--layer", 0, "--layer", -1]):
        output = tmp_path / "out.png"
        code, text = run("show", photo, "-o", output, "--weights", weights, *FAST, *layers)
        assert code == 0, text
        sizes.append(Image.open(output).size)
    assert sizes[1][1] == pytest.approx(2 * sizes[0][1], abs=2)
    (last,), (zeroth, also_last) = drawn
    for a, b in zip(last, also_last, strict=True):
        assert (a.rgb == b.rgb).all()
    assert (zeroth[1].rgb != last[1].rgb).any()


def test_query_is_in_pixels_of_the_picture(weights: Path, tmp_path: Path, drawn: Any) -> None:
    """Which the model sees reduced: a point of the original, and what has its colours there."""
    pixels = np.zeros((320, 480, 3), np.uint8)
    pixels[:] = np.random.default_rng(0).integers(0, 60, pixels.shape)
    pixels[240:320, 360:480] += 180
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    options = ("-o", tmp_path / "out.png", "--weights", weights, *FAST, "--size", 96, "--layer", 0)
    code, text = run("show", tmp_path / "photo.png", "--query", "420,300", *options)
    assert code == 0, text
    ((row,),) = drawn
    assert row[0].point == pytest.approx((84.1, 60.1))
    plain, srt = row[5:]
    for panel, cell in ((plain, (slice(48, 64), slice(80, 96))), (srt, (slice(60, 64), 84))):
        assert panel.rgb.shape == (64, 96, 3)
        light = panel.rgb.sum(2)
        assert (light[cell] == light.max()).all()  # itself: 1
        inside, outside = light[52:, 76:], light[:40, :64]
        assert inside.min() > outside.max()


@pytest.mark.parametrize("query", ["64,0", "0,48", "-1,3", "1.5,3", "3", "1,2,3", "a,b"])
def test_query_outside_is_refused(query: str, weights: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(crops(1)[0]).save(photo)
    output = tmp_path / "out.png"
    code, text = run("show", photo, f"--query={query}", "-o", output, "--weights", weights, *FAST)
    assert code == 1
    assert "--query must" in text
    assert query in text
    assert not output.exists()


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """The first and the last are the same; their numbers are not in the order of their names."""
    path = tmp_path / "frames"
    path.mkdir()
    a, b, c = crops(3)
    for name, pixels in {"f1": a, "f2": b, "f10": c, "f11": a}.items():
        Image.fromarray(pixels).save(path / f"{name}.png")
    return path


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_a_video_is_animated(
    frames: Path, weights: Path, tmp_path: Path, suffix: str, drawn: Any
) -> None:
    output = tmp_path / f"out{suffix}"
    options = ("--weights", weights, *FAST, "--fps", 5, "--query", "5,5")
    code, text = run("show", frames, "-o", output, *options)
    assert code == 0, text
    assert "4 frames, 0 left out" in text
    with Image.open(output) as video:
        assert video.n_frames == 4
        assert video.width > 5 * video.height * 0.9
        video.seek(1)
        assert np.asarray(video.convert("RGB")).std() > 20
        assert video.info["duration"] == 200
    for (row,), pixels in zip(drawn, (*crops(3), crops(1)[0]), strict=True):
        np.testing.assert_array_equal(np.rint(row[0].rgb * 255), pixels)
    assert (drawn[0][0][3].rgb == drawn[3][0][3].rgb).all()  # one basis for all


def test_a_video_as_frames(frames: Path, weights: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = ("-o", output, "--weights", weights, *FAST)
    code, text = run("show", frames, *options)
    assert code == 0, text
    names = [f"0000{i}.png" for i in range(4)]
    assert sorted(path.name for path in output.iterdir()) == names
    first, *middle, last = (np.asarray(Image.open(output / name)) for name in names)
    assert (first == last).all()
    assert all((first != other).any() for other in middle)
    code, text = run("show", frames, *options)  # an older video is not mixed with this one
    assert code == 1
    assert "must be a new folder, or an empty one" in text


def test_a_frame_that_does_not_fit_is_left_out(frames: Path, weights: Path, tmp_path: Path) -> None:
    (frames / "f2.png").write_bytes((frames / "f2.png").read_bytes()[:500])
    Image.new("RGB", (40, 40)).save(frames / "f3.png")
    code, text = run("show", frames, "-o", tmp_path / "out", "--weights", weights, *FAST)
    assert code == 1
    assert "f2.png is no readable picture" in text
    assert "f3.png is 40 x 40; left out" in text
    assert "3 frames, 2 left out" in text
    assert len(list((tmp_path / "out").iterdir())) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frames", "-o", "out.png"], "--output must end in .gif or .webp"),
        (["frames", "-o", "nowhere/out.gif"], "does not exist"),
        (["frames", "-o", "frames"], "must be a new folder"),
        (["empty"], "empty has no pictures"),
        (["frames", "--query", "64,0"], "--query must lie in the picture"),
        (["frames/f1.png", "-o", "out.gif"], "must end in .png"),
    ],
)
def test_what_is_wrong_with_a_video(
    arguments: list[str],
    message: str,
    frames: Path,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    code, text = run("show", *arguments, "--weights", weights, *FAST)
    assert code == 1
    assert message in text
    assert text.count("error: ") == 1
    assert sorted(tmp_path.rglob("*")) == before
