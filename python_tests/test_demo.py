"""The bundled small ViT, the generated scenes, and the scores of SRT on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cli import run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import srt_ext
from srt_ext.demo import quality, scenes
from srt_ext.demo.quality import HELD_OUT, METHODS, RODS, SIDE, Evaluation, frames
from srt_ext.demo.scenes import BOX, CLASSES, CONE, CYLINDER, FAR, Scene, scene
from srt_ext.demo.small import FILE, load_small, make_small
from srt_ext.extraction import Network


def inside(kind: int, points: np.ndarray) -> np.ndarray:
    """Whether points [M, 3] are in the unit solid of a kind, by its definition."""
    x, y, z = points.T
    if kind == BOX:
        return np.abs(points).max(1) <= 1
    if kind == CYLINDER:
        return (np.hypot(x, z) <= 1) & (np.abs(y) <= 1)
    if kind == CONE:
        return (np.hypot(x, z) <= (1 - y) / 2) & (np.abs(y) <= 1)
    return (points**2).sum(1) <= 1


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_rays_end_where_they_enter_a_solid(seed: int) -> None:
    random = np.random.default_rng(seed)
    solid = scenes._solid(random)
    eye = solid.centre + scenes._unit(random.normal(size=3)) * 4
    rays = scenes._unit(solid.centre + random.normal(0, 0.4, (300, 3)) - eye)
    t, normals = scenes._intersect(solid, eye[None], rays)

    def within(distance: np.ndarray) -> np.ndarray:
        points = eye + rays * distance[:, None]
        return inside(solid.kind, (points - solid.centre) @ solid.turn / solid.radii)

    hit = t < FAR
    steps = np.linspace(0, 8, 400)
    walked = np.stack([within(np.full(len(rays), step)) for step in steps])  # [steps, rays]
    before = steps[:, None] < np.where(hit, t, FAR) - 1e-6
    assert not (walked & before).any()  # no ray passes through a solid
    assert within(t + 1e-5)[hit].mean() > 0.98  # except rays that graze an edge
    assert (scenes._dot(normals, rays)[hit] < 1e-6).all()  # outward: against the ray
    np.testing.assert_allclose(np.linalg.norm(normals[hit], axis=1), 1, atol=1e-6)


def test_labels_and_depth_of_a_scene_are_consistent() -> None:
    made = [scene(seed, 48, 80) for seed in range(20)]
    for a, b in zip(made[5], scene(5, 48, 80), strict=True):  # a seed determines the scene
        np.testing.assert_array_equal(a, b)
    assert (made[5].pixels != made[6].pixels).any()
    for one in made:
        assert one.pixels.shape == (48, 80, 3)
        assert one.pixels.dtype == np.uint8
        assert one.nearness.dtype == np.float32
        assert (
            (one.nearness == 0) == (one.labels == 0)
        ).all()  # only the background is at infinity
        assert ((one.solids > 0) == (one.labels >= BOX)).all()
        for number in np.unique(one.solids)[1:]:
            assert len(np.unique(one.labels[one.solids == number])) == 1
        assert one.pixels.std() > 2
    assert max(len(np.unique(one.solids)) for one in made) > 6
    assert set(np.unique([one.labels for one in made])) == set(range(len(CLASSES)))
    # The floor is nearer in lower rows.
    floor = made[0].labels == 1
    below = floor[1:] & floor[:-1]
    assert (np.diff(made[0].nearness, axis=0)[below] > 0).mean() > 0.95


def test_a_second_camera_sees_the_same_scene() -> None:
    """Points of the first frame are in the second frame where its camera projects them."""
    seed, shape, step = 7, (56, 64), 0.4
    for rods in (0, 4):
        first, second = (scene(seed, *shape, rods=rods, step=s) for s in (0, step))
        cameras = [scenes._camera(np.random.default_rng(seed), *shape, s) for s in (0, step)]
        assert cameras[1][0] - cameras[0][0] == pytest.approx([step, 0, 0])
        seen = np.flatnonzero(first.nearness)
        (eye, rays, forward), (eye2, rays2, forward2) = cameras
        assert forward2[0] * scenes.AIM == pytest.approx(
            -step * forward2[2]
        )  # it turns back to the scene
        depth = 1 / first.nearness.ravel()[seen, None]
        away = eye + rays[seen] * depth / (rays[seen] @ forward)[:, None] - eye2
        cosines = scenes._unit(away) @ rays2.T
        pixel, in_view = cosines.argmax(1), cosines.max(1) > np.cos(0.01)
        ratio = second.nearness.ravel()[pixel] * (away @ forward2)
        visible = in_view & (np.abs(ratio - 1) < 0.02)
        same = first.solids.ravel()[seen] == second.solids.ravel()[pixel]
        assert visible.mean() > 0.6
        assert same[visible].mean() > 0.97  # except pixels at outlines
        assert (ratio[in_view] > 0.9).mean() > 0.97  # occluders are nearer
        assert (first.pixels != second.pixels).any(2).mean() > 0.5


def test_rods_are_added_to_a_scene_and_are_thin() -> None:
    without, made = scene(11, SIDE, SIDE), scene(11, SIDE, SIDE, rods=RODS)
    rods = (made.solids > 0) & (made.solids <= RODS)
    assert rods.any()
    np.testing.assert_array_equal(
        np.where(rods, 0, made.solids),
        np.where(rods | (without.solids == 0), 0, without.solids + RODS),
    )
    random = np.random.default_rng(0)
    for rod in (scenes._rod(random) for _ in range(50)):
        assert np.sort(rod.radii)[1] <= 0.035 < 0.3 < rod.radii.max()


def test_the_scene_that_is_drawn_is_the_first_with_three_rods() -> None:
    def rods(pair: tuple[Scene, Scene]) -> int:
        counts = [[(made.solids == n).sum() for n in range(1, RODS + 1)] for made in pair]
        return int((np.min(counts, 0) >= SIDE * SIDE / 200).sum())

    drawn = quality.first_with_rods(HELD_OUT)
    seed = HELD_OUT
    while rods(frames(seed)) < 3:
        seed += 1
    np.testing.assert_array_equal(drawn[1].pixels, frames(seed)[1].pixels)
    assert (drawn[0].solids != drawn[1].solids).mean() > 0.01


def test_labels_follow_the_most_similar_features() -> None:
    field = torch.randn(1, 16, 6, 7)
    labels = np.random.default_rng(0).integers(4, size=(6, 7)).repeat(2, 0).repeat(2, 1)
    moved = quality.propagate(field, field.roll((2, 1), (2, 3)) * 3, labels)
    np.testing.assert_array_equal(moved, np.roll(labels, (4, 2), (0, 1)))
    # A cell takes a label that covers more than half of it; smaller shares are lost.
    labels = np.zeros((8, 16), dtype=np.uint8)
    labels[:, :3], labels[:, 8:13] = 1, 2
    whole = torch.eye(2)[None, :, None]  # [1, C, h, w]: two cells
    np.testing.assert_array_equal(np.unique(quality.propagate(whole, whole, labels)), [0, 2])


def test_thin_solids_and_scores_of_outlines() -> None:
    solids = np.zeros((SIDE, SIDE), dtype=np.uint8)
    for number, width in enumerate((8, 10), 1):
        solids[20 * number : 20 * number + width, 10:60] = number
    solids[-1, -4:] = 3  # too small to be scored
    made = scene(0, SIDE, SIDE)._replace(solids=solids)
    assert quality.solids_of((made, made)) == {1: True, 2: False}
    bar = solids == 1
    assert quality.outline_f(bar, bar) == quality.outline_f(bar, np.roll(bar, 1, 0)) == 1
    assert quality.iou(bar, np.roll(bar, 4, 0)) == pytest.approx(1 / 3)
    assert quality.outline_f(bar, np.roll(bar, 4, 0)) < 0.2
    assert quality.outline_f(bar, np.zeros_like(bar)) == 0
    half = bar & (np.arange(SIDE) < 35)  # an exact half: full precision, half of the recall
    assert 0.6 < quality.outline_f(bar, half) < 0.8


def test_the_small_vit_is_small_and_supports_any_image_size() -> None:
    assert FILE.stat().st_size <= 3e6
    model, config = load_small()
    assert not model.training
    assert sum(p.numel() for p in make_small().parameters()) == sum(
        p.numel() for p in model.parameters()
    )
    assert model(torch.zeros(2, 3, 40, 64)).shape == (2, 40, len(CLASSES) + 1)
    assert config["mean"] == config["std"] == (0.5, 0.5, 0.5)
    field, prefix = srt_ext.SRT(model, views=4, stride=2)(torch.zeros(1, 3, 39, 61))
    assert field.shape == (1, 128, 20, 31)
    assert prefix is None


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return Evaluation(Network.load("small"), "4")


def test_fields_equal_those_of_the_model(evaluation: Evaluation) -> None:
    """Plain tokens and SRT, against features of the model and their mean over the views."""
    pixels = scene(3, 48, 64).pixels
    plain, _, mean, _, scaled = evaluation.fields(pixels)
    image = evaluation.network.image(pixels)
    model = evaluation.network.model
    with torch.no_grad():
        own = model.forward_features(image)[0].T.reshape(1, -1, 6, 8)
        torch.testing.assert_close(plain, own, atol=1e-4, rtol=1e-4)
        offsets = srt_ext.views.best(4, 3).offsets
        tokens = model.forward_features(srt_ext.shift(image, offsets)[:, 0])[:, None]
    expected = srt_ext.reference.ensemble(tokens.double(), offsets, (6, 8), (8, 8), stride=2)
    np.testing.assert_allclose(mean, expected, atol=1e-4, rtol=1e-4)
    assert scaled.shape == mean.shape


@pytest.mark.slow
def test_srt_improves_the_scores_on_exact_labels(evaluation: Evaluation) -> None:
    """The whole pipeline: weights, shifts, ensemble. Margins are wide."""
    scores = evaluation.scores(frames(HELD_OUT + 1000 + i) for i in range(16))
    unmoved, plain, bilinear, srt, enlarged, both = scores.values()
    for worse, better in ((plain, bilinear), (bilinear, srt), (enlarged, both), (srt, both)):
        assert better.solids > worse.solids + 0.02
        assert better.thin > worse.thin + 0.02
        assert better.outlines > worse.outlines + 0.01
    assert bilinear.solids > unmoved.solids + 0.05
    assert bilinear.outlines > unmoved.outlines + 0.1
    assert srt.thin > unmoved.thin + 0.05


@pytest.mark.slow
def test_the_command_draws_and_scores(tmp_path: Path) -> None:
    picture = tmp_path / "demo.png"
    text = run("demo", "-o", picture, "--scenes", 1, "--views", "best:4:3")
    for way in (quality.UNMOVED, *METHODS):
        assert way in text
    with Image.open(picture) as made:
        assert made.width > 1000
