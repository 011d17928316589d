"""The small ViT that comes with the package, the scenes it is shown, and whether SRT helps it."""

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
from srt_ext.cli.common import Network
from srt_ext.demo import scenes
from srt_ext.demo.quality import HELD_OUT, METHODS, SIDE, Evaluation, first_complete_seed
from srt_ext.demo.scenes import BOX, CLASSES, CONE, CYLINDER, FAR, scene
from srt_ext.demo.small import FILE, load_small, make_small


def inside(kind: int, points: np.ndarray) -> np.ndarray:
    """Whether points [M, 3] lie in the unit solid of a kind: its definition."""
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
    assert not (walked & before).any()  # nothing was passed through
    assert within(t + 1e-5)[hit].mean() > 0.98  # all but rays that graze an edge
    assert (scenes._dot(normals, rays)[hit] < 1e-6).all()  # outward: against the ray
    np.testing.assert_allclose(np.linalg.norm(normals[hit], axis=1), 1, atol=1e-6)


def test_labels_and_depth_of_a_scene_belong_together() -> None:
    made = [scene(seed, 48, 80) for seed in range(20)]
    for a, b in zip(made[5], scene(5, 48, 80), strict=True):  # a seed gives one scene
        np.testing.assert_array_equal(a, b)
    assert (made[5].pixels != made[6].pixels).any()
    for one in made:
        assert one.pixels.shape == (48, 80, 3)
        assert one.pixels.dtype == np.uint8
        assert one.nearness.dtype == np.float32
        assert ((one.nearness == 0) == (one.labels == 0)).all()  # only the background is far
        assert one.pixels.std() > 2
    assert set(np.unique([one.labels for one in made])) == set(range(len(CLASSES)))
    # Down the floor it comes nearer.
    floor = made[0].labels == 1
    below = floor[1:] & floor[:-1]
    assert (np.diff(made[0].nearness, axis=0)[below] > 0).mean() > 0.95


def test_the_scene_that_is_drawn_has_all_classes() -> None:
    seed = first_complete_seed(HELD_OUT)
    counts = [
        np.bincount(scene(s, SIDE, SIDE).labels.ravel(), minlength=6).min()
        for s in range(HELD_OUT, seed + 1)
    ]
    assert [count * 50 >= SIDE * SIDE for count in counts] == [False] * (seed - HELD_OUT) + [True]


def test_the_small_vit_is_small_and_takes_any_picture() -> None:
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
    return Evaluation(Network("small", None, [-1]), "best:9:3")


def test_predictions_are_those_of_the_model(evaluation: Evaluation) -> None:
    """The head on fields, against the model's own answer and its mean over the views."""
    made = scene(3, 48, 64)
    plain, _, mean, _ = evaluation.predict(made.pixels)
    image = evaluation.network.image(made.pixels)
    own = evaluation.network.model(image)[0].detach().reshape(6, 8, -1)
    np.testing.assert_allclose(plain.nearness[4::8, 4::8], own[..., -1], atol=1e-4)
    np.testing.assert_array_equal(plain.labels[4::8, 4::8], own[..., :-1].argmax(2))
    offsets = srt_ext.views.parse("best:9:3").offsets
    views = srt_ext.shift(image, offsets)[:, 0]
    said = evaluation.network.model(views).detach()[:, None]
    field = srt_ext.reference.ensemble(said.double(), offsets, (6, 8), (8, 8))[0]
    np.testing.assert_allclose(mean.nearness, field[-1], atol=1e-4)


@pytest.mark.slow
def test_srt_helps_on_exact_labels(evaluation: Evaluation) -> None:
    """The quality of the whole chain: weights, shifts, ensemble. Margins are wide."""
    scores = evaluation.scores(scene(HELD_OUT + 1000 + i, SIDE, SIDE) for i in range(24))
    plain, bilinear, mean, median = (scores[way] for way in METHODS)
    assert plain.segments > 0.7
    assert bilinear.kinds > 0.4
    assert bilinear.nearness < 0.2
    assert bilinear.outlines > plain.outlines + 0.03
    assert mean.outlines > bilinear.outlines + 0.01
    assert median.outlines > bilinear.outlines + 0.01
    assert mean.segments > bilinear.segments
    # What SRT does not help must not suffer, either.
    assert mean.nearness < bilinear.nearness + 0.003
    assert mean.kinds > bilinear.kinds - 0.02


def test_the_command_draws_and_scores(tmp_path: Path) -> None:
    picture = tmp_path / "demo.png"
    text = run("demo", "-o", picture, "--scenes", 2, "--views", "best:4:3")
    for way in METHODS:
        assert way in text
    with Image.open(picture) as made:
        assert made.width > 1000
