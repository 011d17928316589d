"""Designs of views, and the strings that select them."""

import contextlib
import functools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srt_ext import views
from srt_ext.views import Views

COUNTS = st.integers(1, 120)
RADII = st.floats(0.01, 1000)


def weights_of(design: torch.Tensor | Views) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks the invariants of every design; returns offsets and weights in float64."""
    offsets, weights, _ = views.resolve(design)
    assert offsets.dtype == torch.float32
    assert offsets.dim() == 2
    assert offsets.shape[1] == 2
    assert offsets.isfinite().all()
    if weights is None:
        weights = torch.full((len(offsets),), 1 / len(offsets), dtype=torch.float64)
    else:
        assert weights.dtype == torch.float32
        assert weights.shape == offsets.shape[:1]
        assert (weights >= 0).all()
    weights = weights.double()
    torch.testing.assert_close(weights.sum().item(), 1.0, rtol=0, atol=1e-6)
    offsets = offsets.double()
    assert (weights @ offsets).abs().max() <= 1e-6 * offsets.abs().max()
    return offsets, weights


def covariance(design: torch.Tensor | Views) -> torch.Tensor:
    offsets, weights = weights_of(design)
    return offsets.T @ (weights[:, None] * offsets)


def symmetric(offsets: torch.Tensor) -> bool:
    """Whether the design contains exactly (-dy, -dx) for every (dy, dx)."""
    return sorted(map(tuple, offsets.tolist())) == sorted(map(tuple, (0 - offsets).tolist()))


def test_grid_is_every_offset_of_the_square() -> None:
    steps = torch.tensor([-6.0, -2.0, 2.0, 6.0])
    assert torch.equal(views.grid(6, step=4).offsets, torch.cartesian_prod(steps, steps))
    assert torch.equal(views.grid(0).offsets, torch.zeros(1, 2))


@given(st.integers(1, 40), st.floats(0.001, 10))
def test_grid_supports_fractional_steps(steps: int, step: float) -> None:
    """Also if step and radius are rounded: 0.3 is not a multiple of 0.1 in binary."""
    radius = steps * step / 2
    offsets = views.grid(radius, step).offsets
    assert len(offsets) == (steps + 1) ** 2
    assert symmetric(offsets)
    assert offsets.max().item() == torch.tensor(radius).item()
    line = offsets[: steps + 1, 1].double()
    torch.testing.assert_close(line.diff(), torch.full((steps,), step).double(), rtol=1e-4, atol=0)
    weights_of(offsets)


def test_paper_counts_the_identity_twice() -> None:
    offsets = views.paper(3).offsets
    assert torch.equal(offsets[0], torch.zeros(2))
    assert torch.equal(offsets[1:], views.grid(3).offsets)


@given(COUNTS, RADII)
def test_no_two_views_of_a_lattice_share_a_dy_or_a_dx(n: int, radius: float) -> None:
    offsets = views.lattice(n, radius).offsets
    weights_of(offsets)
    assert symmetric(offsets)
    for axis in offsets.T:
        values = axis.sort().values.double()
        if n == 1:
            assert values.item() == 0
        else:
            even = torch.linspace(-radius, radius, n, dtype=torch.float64)
            torch.testing.assert_close(values, even, rtol=0, atol=1e-6 * radius)
            assert values[-1].item() == torch.tensor(radius).item()


@given(st.integers(4, 120))
def test_views_of_a_lattice_keep_their_distance(n: int) -> None:
    """The densest packing has 1.07 sqrt(n); dy and dx correlate little."""
    offsets = views.lattice(n, (n - 1) / 2).offsets.double()
    apart = torch.cdist(offsets, offsets) + 1e9 * torch.eye(n)
    assert apart.min() >= 0.9 * math.sqrt(n)
    cov = covariance(views.lattice(n, 1))
    assert abs(cov[0, 1]) <= 0.29 * cov[0, 0]
    if n in (4, 9, 16, 25):  # a rotated square grid
        assert abs(cov[0, 1]) <= 1e-6 * cov[0, 0]


@pytest.mark.slow
def test_the_largest_lattice_has_distinct_views() -> None:
    assert len(views.lattice(views.MAX_VIEWS, 8).offsets.unique(dim=0)) == views.MAX_VIEWS


@given(COUNTS, RADII, st.integers(0, 2**63 - 1))
def test_sobol_is_reproducible_and_as_wide_as_the_square(n: int, radius: float, seed: int) -> None:
    state = torch.get_rng_state()
    offsets = views.sobol(n, radius, seed).offsets
    assert torch.equal(torch.get_rng_state(), state)
    assert len(offsets) == n
    weights_of(offsets)
    # The width of the square, for any centre.
    assert ((offsets.amax(0) - offsets.amin(0)) <= 2 * radius * (1 + 1e-6)).all()
    assert torch.equal(offsets, views.sobol(n, radius, seed).offsets)


def test_sobol_fills_the_square_and_has_seeds() -> None:
    offsets = views.sobol(64, 4).offsets
    cells = ((offsets + 4) / 2).floor().long().clamp(0, 3)  # 16 cells of 2 pixels, 4 views in each
    counts = (cells[:, 0] * 4 + cells[:, 1]).bincount(minlength=16)
    assert counts.min() >= 2
    assert not torch.equal(offsets, views.sobol(64, 4, seed=1).offsets)


@given(st.integers(4, 60), st.one_of(st.floats(2, 1000), st.integers(2, 12)))
def test_ring_has_the_moments_of_the_whole_grid(n: int, radius: float) -> None:
    offsets, _, _ = design = views.ring(n, radius)
    assert len(offsets) == n
    assert torch.equal(offsets[0], torch.zeros(2))
    far = offsets[1:].double().norm(dim=1)
    torch.testing.assert_close(far, torch.full_like(far, radius), rtol=1e-6, atol=0)
    expected = torch.eye(2, dtype=torch.float64) * radius * (radius + 1) / 3
    if isinstance(radius, int):
        torch.testing.assert_close(covariance(views.grid(radius)), expected)
    torch.testing.assert_close(covariance(design), expected, rtol=1e-6, atol=1e-6 * radius**2)


@given(st.data())
def test_best_has_the_variance_of_the_whole_grid(data: st.DataObject) -> None:
    radius = data.draw(st.integers(0, 8))
    whole = views.grid(radius).offsets
    count = data.draw(st.integers(1, len(whole)))
    offsets = views.best(count, radius).offsets
    assert offsets.shape == (count, 2)
    assert symmetric(offsets)
    assert torch.equal(offsets, offsets.round())  # so that views are not interpolated
    assert offsets.abs().max() <= radius
    if count >= 7:  # fewer views cannot keep the variance on whole pixels
        cov, expected = covariance(offsets), covariance(whole)
        torch.testing.assert_close(cov.diagonal(), expected.diagonal(), rtol=0.2, atol=0)
    if count == len(whole):
        assert sorted(offsets.tolist()) == sorted(whole.tolist())
    elif 2 * count <= len(whole):
        assert len(offsets.unique(dim=0)) == count


@given(st.lists(st.floats(0.01, 1000), min_size=1, max_size=5))
def test_neighbours_surround_the_unshifted_image(distances: list[float]) -> None:
    """Row by row, for each distance in order."""
    whole = views.grid(1).offsets  # also row by row
    around = whole[whole.abs().sum(1) > 0], whole[whole.abs().sum(1) == 1]
    for design, steps in zip((views.moore, views.neumann), around, strict=True):
        offsets = design(distances).offsets
        weights_of(offsets)
        assert torch.equal(offsets[0], torch.zeros(2))
        for part, distance in zip(offsets[1:].split(len(steps)), distances, strict=True):
            assert torch.equal(part, torch.tensor(distance) * steps)
        assert torch.equal(design(distances[0]).offsets, offsets[: 1 + len(steps)])


@given(st.data())
def test_patches_are_whole_and_far_from_each_other(data: st.DataObject) -> None:
    grid = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    share = data.draw(st.floats(0, 1))
    reach = torch.tensor([round(share * tokens) for tokens in grid])
    every = int((2 * reach + 1).prod())
    n, seed = data.draw(st.integers(1, min(every, 40))), data.draw(st.integers(0, 99))
    offsets, weights, mirror = views.patches(n, grid, share, seed, patch=(14, 8))
    assert (weights, mirror, offsets.dtype) == (None, None, torch.float32)
    steps = offsets / torch.tensor([14, 8])
    assert torch.equal(steps, steps.round())
    assert (steps.abs() <= reach).all()
    assert torch.equal(steps[0], torch.zeros(2))
    assert len(steps.unique(dim=0)) == n
    # Each is the farthest from the previous ones, so the distances to them decrease.
    apart = [torch.cdist(steps[i : i + 1], steps[:i]).min().item() for i in range(1, n)]
    assert apart == sorted(apart, reverse=True)
    same_seed, other = (
        views.patches(n, grid, share, s, patch=(14, 8)).offsets for s in (seed, 99 - seed)
    )
    assert torch.equal(same_seed, offsets)
    if n == every:
        assert sorted(other.tolist()) == sorted(offsets.tolist())


def test_patches_depend_on_the_seed_and_scale_with_the_patch() -> None:
    design = views.patches(10, 37, seed=1, patch=14)
    assert not same(design, views.patches(10, 37, seed=2, patch=14))
    assert torch.equal(design.offsets * 2, views.patches(10, 37, seed=1, patch=28).offsets)
    assert design.offsets.abs().max() == 6 * 14  # round(0.15 * 37)
    # The patch is that of the enlarged image, as in SRT.
    assert same(views.resolve("patches:10:37x37:0.15:1", 14, 1.5), design)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 9, 25, 121])
def test_spread_is_a_permutation_with_evenly_spread_prefixes(count: int) -> None:
    line = torch.stack([torch.zeros(count), torch.arange(count)], 1)
    order = views.spread(line).offsets[:, 1].long().tolist()
    assert sorted(order) == list(range(count))
    for n in (1, count // 3, count // 2):
        # The largest gap between the first n is at most three times the mean gap.
        seen = sorted(order[:n])
        gaps = [b - a for a, b in zip([0, *seen], [*seen, count], strict=True)]
        assert max(gaps) <= 3 * count / (n + 1) + 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("grid:3", views.grid(3)),
        ("grid:0.75:0.5", views.grid(0.75, 0.5)),
        ("paper:2", views.paper(2)),
        ("lattice:7:2.5", views.lattice(7, 2.5)),
        ("sobol:8:3", views.sobol(8, 3)),
        ("sobol:8:3.5:7", views.sobol(8, 3.5, 7)),
        ("ring:7:3.25", views.ring(7, 3.25)),
        ("best:9", views.best(9)),
        ("best:7:5", views.best(7, 5)),
        ("best:9:1", views.grid(1)),
        ("9", views.best(9)),
        ("best:9+flip", views.flipped(views.best(9))),
        ("ring:7:3+flip", views.flipped(views.ring(7, 3))),
        ("9+flip", views.flipped(views.best(9))),
        ("ring:7:3+vflip", views.flipped(views.ring(7, 3), "y")),
        ("4+flip+vflip", views.flipped(views.flipped(views.best(4)), "y")),
        ("moore:1,2", views.moore((1, 2))),
        ("neumann:2.5", views.neumann(2.5)),
        ("patches:4:9x7", views.patches(4, (9, 7))),
        ("patches:4:9x7:0.3", views.patches(4, (9, 7), 0.3)),
        ("patches:4:9x7:0.3:5+flip", views.flipped(views.patches(4, (9, 7), 0.3, 5))),
    ],
)
def test_parse_returns_the_design(text: str, expected: Views) -> None:
    assert same(views.parse(text), expected)


def same(one: Views, two: Views) -> bool:
    return all(
        a is b is None or torch.equal(a, b)  # type: ignore[arg-type]
        for a, b in zip(one, two, strict=True)
    )


def test_a_number_of_views_reaches_three_eighths_of_a_patch() -> None:
    for patch, radius in ((16, 6), (14, 5), (8, 3), (32, 12), (1, 1), ((16, 8), (6, 3))):
        for given_views in (9, "9", "best:9"):
            expected = views.best(9, radius)
            assert same(views.resolve(given_views, patch), expected)
            # The radius is in pixels of the enlarged image, as the patch.
            assert same(views.resolve(given_views, patch, 1.5), expected)


def test_best_reaches_as_far_as_each_side_of_a_patch() -> None:
    assert torch.equal(
        views.best(25 * 9, (12, 4)).offsets,
        torch.cartesian_prod(torch.arange(-12.0, 13), torch.arange(-4.0, 5)),
    )
    narrow, square = views.best(16, (6, 3)).offsets, views.best(16, 6).offsets
    assert torch.equal(narrow[:, 0], square[:, 0])
    assert torch.equal(narrow[:, 1], views.best(16, 3).offsets[:, 1])


@given(st.sampled_from([1.25, 1.5, 2, 1.37]), st.data())
def test_designs_are_on_whole_pixels_of_the_enlarged_image(
    scale: float, data: st.DataObject
) -> None:
    text = data.draw(st.sampled_from(["grid:3", "sobol:8:3", "ring:7:4", "paper:2", "best:5:6"]))
    design = views.parse(text)
    expected = (design.offsets.double() * scale).round().float()
    for given_views in (text, design):  # offsets that are given as tensors are not rounded
        assert torch.equal(views.resolve(given_views, 16, scale).offsets, expected)
    assert symmetric(expected) or text.startswith(("sobol", "ring"))
    tensors = views.resolve((design.offsets, design.weights), 16, scale)
    assert torch.equal(tensors.offsets, design.offsets * scale)


def test_flipped_has_every_view_and_its_mirror_image() -> None:
    """Both halves have the same weights; flipped twice, each view occurs twice."""
    design = views.flipped(views.ring(5, 3))
    assert design.weights is not None
    assert design.mirror is not None
    assert torch.equal(design.offsets[:5], design.offsets[5:])
    torch.testing.assert_close(design.weights[:5], views.ring(5, 3).weights / 2)  # type: ignore[operator]
    assert design.mirror.tolist() == [[False, False]] * 5 + [[False, True]] * 5
    upside_down = views.flipped(views.grid(0), "y")
    assert upside_down.mirror is not None
    assert upside_down.mirror.tolist() == [[False, False], [True, False]]
    twice = views.flipped(design)
    assert twice.mirror is not None
    assert twice.mirror[:, 1].sum() == 10
    assert same(design.take([7, 2]), design.take(torch.tensor([7, 2])))
    assert same(design.take(slice(5)), Views(*(part[:5] for part in design)))  # type: ignore[index]


@pytest.mark.parametrize(
    "text",
    [
        *("", "grid", "grid:", "grid:x", "grid:-1", "grid:1:2:3", "grid:3:0", "grid:3:4", "x:3"),
        *("grid:1000000", "grid:99999999999999999999", "grid:1:0.000001", "paper:1000"),
        *("grid:nan", "grid:inf", "grid:1e3", "grid: 3", "grid:3\n", "grid:1.", "grid:.5"),
        *("grid:1_0", "grid:٣", "best:٣"),
        *("grid:" + "9" * 400, "grid:3:0." + "0" * 400 + "1", "lattice:" + "9" * 5000 + ":1"),
        *("paper:2.5", "paper:1:2", "lattice:7", "lattice:7.5:3", "lattice:0:3", "lattice:7:3:1"),
        *("sobol:8", "sobol:8:3:1:2", "sobol:8:3:1.5", "sobol:8:3:99999999999999999999"),
        *("ring:3", "ring:3:2", "ring:7:3:1", "ring:65537:3", "ring:7:1.9"),
        *("best", "best:0", "best:9:3:1", "best:170", "best:9:2.5", "best:9:0"),
        *("Views:3", "spread:3", "flipped:3", "best:4+", "best:4+flip+flip", "+flip", "4:"),
        *("4+vflip+flip", "4+vflip+vflip", "4++flip", "moore", "moore:", "moore:0", "moore:1,"),
        *("moore:1:2", "moore:1,-2", "neumann:1e3", "neumann:,1", "neumann:2000000"),
        *("patches:4", "patches:4:5", "patches:4:5x", "patches:4:5x5:2", "patches:4:0x5"),
        *("patches:0:5x5", "patches:26:5x5:0.4", "patches:4:5x5:0.4:1:1", "patches:4:5x5x5"),
    ],
)
def test_parse_raises(text: str) -> None:
    """The error lists the forms and the value received."""
    with pytest.raises(ValueError, match="views must be a number of views, such as 4") as caught:
        views.parse(text)
    assert f"got {text!r}" in str(caught.value)


@given(st.text(alphabet="gridlatcesobprf:.0123456789e-+", max_size=12))
def test_parse_of_any_text_is_a_design_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        weights_of(views.parse(text))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: views.grid(-1), ValueError, "views.grid: radius must be from 0 to 2.20 pixels"),
        (lambda: views.grid(math.nan), ValueError, "radius must be"),
        (lambda: views.grid(math.inf), ValueError, "radius must be"),
        (lambda: views.grid(1, 0), ValueError, "step must be > 0"),
        (lambda: views.grid(1, math.inf), ValueError, "step must be > 0 pixels, and finite"),
        (lambda: views.grid(1, 1e9), ValueError, "step must divide"),
        (lambda: views.grid(1, 5e-324), ValueError, "at most 65536 views"),
        (lambda: views.grid(1, 0.3), ValueError, "step must divide 2 . radius; got radius 1"),
        (lambda: views.paper(2.5), TypeError, "radius must be an integer"),  # type: ignore[arg-type]
        (lambda: views.lattice(True, 3), TypeError, "n must be an integer"),
        (lambda: views.lattice(0, 3), ValueError, "n must be an integer >= 1; got 0"),
        (lambda: views.lattice(7, -1), ValueError, "views.lattice: radius must be"),
        (lambda: views.sobol(7, 3, -1), ValueError, "seed must be an integer >= 0"),
        (lambda: views.sobol(7, 3, 2**63), ValueError, "seed must be < 2.63"),
        (lambda: views.ring(3, 3), ValueError, "n must be an integer >= 4; got 3"),
        (lambda: views.ring(7, 1.5), ValueError, "radius must be from 2 to 2.20 pixels; got 1.5"),
        (lambda: views.flipped("4"), TypeError, "views must be Views; got str"),  # type: ignore[arg-type]
        (lambda: views.flipped(views.grid(0), "z"), ValueError, "axis must be 'x' or 'y'; got 'z'"),  # type: ignore[arg-type]
        (lambda: views.moore([]), ValueError, r"must be one or more numbers > 0 .*; got \[\]"),
        (lambda: views.moore([1, 0]), ValueError, r"views.moore: .*got \[1.0, 0.0\]"),
        (lambda: views.neumann(math.nan), ValueError, r"views.neumann: distances .*got \[nan\]"),
        (lambda: views.neumann("12"), TypeError, "distances must be one or more .*got '1'"),  # type: ignore[arg-type]
        (lambda: views.moore(range(1, 9000)), ValueError, "at most 65536 views; got 71993"),
        (lambda: views.patches(0, 9), ValueError, "n must be an integer >= 1; got 0"),
        (lambda: views.patches(4, 9.5), TypeError, "grid must be an integer or a pair"),  # type: ignore[arg-type]
        (lambda: views.patches(4, 9, -0.1), ValueError, "fraction must be from 0 to 1; got -0.1"),
        (lambda: views.parse(4), TypeError, "views.parse: text must be a string; got int"),
        (lambda: views.patches(4, 9, seed=2**63), ValueError, "patches: seed must be < 2.63"),
        (lambda: views.patches(4, 9, seed=-1), ValueError, "seed must be an integer >= 0; got -1"),
        (
            lambda: views.patches(4, 9, patch=0),
            ValueError,
            "patch must be an integer or a pair",
        ),
        (
            lambda: views.patches(10, 9),
            ValueError,
            r"n must be <= 9, the number of offsets within 0.15 of a grid of \[9, 9\]; got 10",
        ),
        (lambda: views.best(0), ValueError, "count must be an integer >= 1; got 0"),
        (lambda: views.best(170), ValueError, "count must be <= 169 at radius 6; got 170"),
        *(
            (functools.partial(views.resolve, given_views), error, message)
            for given_views, error, message in (
                ([[0, 0]], TypeError, "SRT: views must be a design .*a torch.Tensor.*; got list"),
                (True, TypeError, "got bool"),
                (([[0, 0]], None), TypeError, "got list"),
                ((torch.zeros(1, 2),), TypeError, "got tuple"),
                (torch.zeros(0, 2), ValueError, r"must be \[V, 2\] with V >= 1; got \[0, 2\]"),
                (torch.zeros(3), ValueError, r"got \[3\]"),
                ((torch.zeros(2, 2), torch.ones(3)), ValueError, r"\[V\] with V = 2; got \[3\]"),
                ((torch.zeros(2, 2), torch.ones(2, 1)), ValueError, r"got \[2, 1\]"),
                ((torch.zeros(2, 2), [0.5, 0.5]), TypeError, "weights of views must be a torch.T"),
                (Views(torch.zeros(2, 2), None, torch.zeros(2, 2)), TypeError, "bool.*float32"),
                (
                    Views(torch.zeros(2, 2), None, torch.zeros(1, 2, dtype=torch.bool)),
                    ValueError,
                    r"mirror of views must be bool \[V, 2\], .*V = 2; got \[1, 2\]",
                ),
                (0, ValueError, "got 0"),
                ("ring", ValueError, "views must be"),
            )
        ),
    ],
)
def test_wrong_arguments_raise(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


def test_resolve_accepts_every_form_of_views() -> None:
    offsets, weights, _ = design = views.ring(5, 2)
    for given_views, expected in (
        (offsets, Views(offsets)),
        ((offsets, None), Views(offsets)),
        ((offsets, weights), design),
        (design, design),
        ("ring:5:2", design),
        ("grid:1", views.grid(1)),
        (9, views.best(9)),
        (tuple(views.flipped(design)), views.flipped(design)),
    ):
        assert same(views.resolve(given_views), expected)  # type: ignore[arg-type]


def test_best_is_the_design_of_the_published_tables() -> None:
    """The committed tables match the committed results, and ``best`` is the design they select."""
    designs = pytest.importorskip("research.views")
    results = designs.load(designs.RESULTS / "views.json")
    assert designs.document(results) == (designs.RESULTS / "views.md").read_text()
    for row in results["rows"]:
        if row["design"] == "lattice, matched":
            count, radius = row["views"], row["radius"]
            measured = designs.matched_lattice(count, radius, 0).round()
            assert torch.equal(views.best(count, radius).offsets, measured)
