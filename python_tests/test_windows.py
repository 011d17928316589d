"""windows and sample: against the oracle, patches, F.grid_sample, shift, published code."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from backends import GPU, Backend, Ops, each_device, each_gpu, each_kernel
from bounds import WindowsBounds
from budget import assert_within_rounding
from hypothesis import given
from hypothesis import strategies as st
from oracle import (
    check,
    check_containment,
    check_rounding,
    dtypes_of,
    poisoned,
    run,
    values_of,
    windows_points,
)
from samples import (
    DTYPES,
    FAR,
    NUMPY_PADDINGS,
    WINDOWS,
    Pairs,
    Windows,
    each_padding,
    each_value_dtype,
    pairwise,
    random_views,
    windows,
)
from torch.autograd import gradcheck

import srt_ext
from srt_ext import reference

ALL_DTYPES = (*DTYPES, torch.uint8)
GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "spot_window_square.npz"


def grid_centers(grid: tuple[int, int], patch: tuple[int, int]) -> torch.Tensor:
    """The centers of the patches of a ViT, [h * w, 2], in row order."""
    rows, columns = ((torch.arange(n) + 0.5) * p for n, p in zip(grid, patch, strict=True))
    return torch.cartesian_prod(rows, columns)


def patches(image: torch.Tensor, patch: tuple[int, int]) -> torch.Tensor:
    """The patches of an image, [B, N, C, Ph, Pw]."""
    batch, channels = image.shape[:2]
    columns = F.unfold(image, patch, stride=patch)
    return columns.reshape(batch, channels, *patch, -1).permute(0, 4, 1, 2, 3)


# ---- values and gradients -----------------------------------------------------------------------


@each_kernel("windows", "windows_backward")
@each_padding
def test_accuracy_and_containment_in_every_mode(
    kernel: str, padding: str, backend: Backend
) -> None:
    centers = ((3.3, -0.6), (9.0, 2.5), (-31.4, 50.2), (FAR, 1.5), (0.0, -FAR), (-1.0, 36.25))
    sizes = ((7, 37), (7, 48), (1, 40), (40, 1), (2, 3), (1, 1))
    scales = (None, (1.0, 1.5), (0.3, -1.0), (2.0, 0.0), None, (1.0, 16 / 15))
    layouts = ("dense", "channels_last", "sliced")
    for size, dtype, scale, layout in zip(
        sizes, itertools.cycle(DTYPES), scales, itertools.cycle(layouts), strict=False
    ):
        case = Windows(size, (5, 18), centers, scale, 9, layout=layout, padding=padding)
        result = run(backend, kernel, case, values_of(kernel, case, dtype))
        check_rounding(kernel, case, dtype, result)
        if size[1] in (37, 40):  # odd rows; whole lines
            check_containment(kernel, backend, case, dtype)


@pytest.mark.parametrize(
    ("patch", "dtype", "layout"),
    pairwise([(4, 6), (14, 3), (2, 16), (1, 33)], DTYPES, ["dense", "channels_last", "sliced"]),
    ids=str,
)
def test_windows_on_the_grid_are_the_patches(
    patch: tuple[int, int], dtype: torch.dtype, layout: str, backend: Backend
) -> None:
    """Bitwise, also next to non-finite values."""
    grid = (3, 2)
    size = (grid[0] * patch[0], grid[1] * patch[1])
    centers = tuple(map(tuple, grid_centers(grid, patch).tolist()))
    case = Windows(size, patch, centers, channels=9, batch=1, layout=layout)
    image = poisoned("windows", case, dtype)
    result = backend.windows(case, image)
    assert torch.equal(result.nan_to_num(), patches(image.double(), patch).to(dtype).nan_to_num())
    assert torch.equal(result.isnan(), patches(image.isnan().double(), patch) > 0)


@each_padding
def test_whole_pixels_are_those_of_a_padded_image(padding: str, backend: Backend) -> None:
    """Also for positions that differ from whole pixels by a tiny amount."""
    mode: Any = NUMPY_PADDINGS[padding]
    for dtype, scale, hair in itertools.product(
        (torch.float32, torch.uint8), (None, (2.0, -1.0)), (0.0, 1e-14, -(2.0**-41))
    ):
        centers = ((4.5 + hair, 6.0), (1.5, 2.0 - hair), (-3.5, 12.0 + hair))
        case = Windows((8, 11), (3, 4), centers, scale, 2, 1, "dense", padding, torch.float64)
        image = case.image(dtype)
        wide = np.pad(image.numpy(), ((0, 0), (0, 0), (20, 20), (20, 20)), mode)
        expected = []
        for y, x in centers:
            rows = 20 + int(np.floor(y)) + (np.arange(3) - 1) * (2 if scale else 1)
            columns = 20 + round(x) + np.arange(-2, 2)[:: -1 if scale else 1]  # mirrored
            expected.append(wide[0][:, rows[:, None], columns])
        assert np.array_equal(backend.windows(case, image)[0].numpy(), np.stack(expected))


@given(windows(), st.sampled_from(ALL_DTYPES))
def test_strides_of_the_image(backend: Backend, case: Windows, dtype: torch.dtype) -> None:
    """The layout changes only rounding; a copy with the same strides gives equal results."""
    image = case.image(dtype)
    result = backend.windows(case, image)
    dense = backend.windows(case, image.contiguous())
    exact = reference.windows(*case.call(image)[0], padding=case.padding)
    bound = WindowsBounds(case, dtype).windows(image)
    assert_within_rounding(result, exact, bound)
    assert_within_rounding(dense, exact, bound)
    one = image[:1].expand(case.batch, -1, -1, -1)
    assert torch.equal(backend.windows(case, one)[0], result[0])


@pytest.mark.parametrize("name", WINDOWS)
def test_gradients_of_the_points(name: str, backend: Backend) -> None:
    case, dtype = WINDOWS[name], torch.float32
    image, grad = case.image(dtype), torch.randn(case.shape, dtype=torch.float64).to(dtype)
    for place in backend.places:
        result = backend.windows_points(case, grad, image, place=place)
        bound = WindowsBounds(case, dtype).points(grad, image)
        assert_within_rounding(result, windows_points(case, grad, image), bound)


@given(windows(), st.sampled_from(DTYPES))
def test_gradients_of_any_points(backend: Backend, case: Windows, dtype: torch.dtype) -> None:
    image, grad = case.image(dtype), torch.randn(case.shape, dtype=torch.float64).to(dtype)
    bound = WindowsBounds(case, dtype).points(grad, image)
    result = backend.windows_points(case, grad, image)
    assert_within_rounding(result, windows_points(case, grad, image), bound)


def test_pixels_outside_a_window_do_not_change_its_gradients(backend: Backend) -> None:
    case = replace(WINDOWS["real"], window=(3, 5), centers=((4.25, 8.75),), batch=1)
    image, grad = case.image(), torch.randn(1, 1, 3, 3, 5)
    expected = backend.windows_points(case, grad, image)
    image[:, :, :2], image[:, :, 7:] = torch.nan, torch.inf
    image[:, :, :, :5], image[:, :, :, 12:] = torch.nan, torch.inf
    backend.assert_same(backend.windows_points(case, grad, image), expected)


# ---- other implementations ----------------------------------------------------------------------


@pytest.mark.parametrize("module", [srt_ext, reference], ids=["op", "reference"])
@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_windows_equal_grid_sample(padding: str, module: Any) -> None:
    """Values and gradients, also at whole pixels, where both use the right-sided derivative."""
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor([8.0, 16.0], dtype=torch.float64)  # so that its positions are exact
    image = torch.randn(2, 3, 8, 16, generator=generator, dtype=torch.float64).requires_grad_()
    centers = torch.rand(2, 40, 2, generator=generator, dtype=torch.float64) * size
    centers[:, :4] = centers[:, :4].round()
    centers[:, :4, 1] += 0.5
    centers.requires_grad_()
    rows, columns = torch.meshgrid(torch.arange(4) - 1.5, torch.arange(5) - 2.0, indexing="ij")
    places = centers[:, :, None, None] + torch.stack([rows, columns], -1)
    places = (places * (2 / size) - 1).flip(-1).flatten(1, 2)
    expected = F.grid_sample(image, places, padding_mode=padding, align_corners=False)
    expected = expected.unflatten(2, (40, 4)).transpose(1, 2)
    result = module.windows(image, centers, (4, 5), padding=padding)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)

    grad = torch.randn(result.shape, generator=generator, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(r, (image, centers), grad) for r in (result, expected))
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-12)
    # Outside the image grid_sample clamps positions, not pixels.
    inside = ((centers > 2.5) & (centers < size - 2.5)).all(-1)
    assert inside[:, :4].any()
    assert inside[:, 4:].any()
    torch.testing.assert_close(ours[1][inside], theirs[1][inside], rtol=0, atol=1e-11)


@each_padding
def test_a_moved_grid_has_the_patches_of_shift(padding: str) -> None:
    """SPoT and SRT agree: windows at grid + d are the patches of the view shifted by -d."""
    image = torch.randn(2, 3, 12, 24, dtype=torch.float64)
    centers = grid_centers((3, 4), (4, 6)).double().expand(2, -1, -1)
    for d in torch.tensor([[1.25, -2.5], [-7.75, 0.0], [3.0, 20.1]], dtype=torch.float64):
        view = srt_ext.shift(image, -d[None], padding=padding)[0]
        result = srt_ext.windows(image, centers + d, (4, 6), padding=padding)
        torch.testing.assert_close(result, patches(view, (4, 6)), rtol=0, atol=1e-13)


@pytest.mark.skipif(not GOLDEN.exists(), reason="evaluation data, not in the repository")
def test_windows_equal_the_published_sampler() -> None:
    """It spreads P samples over P pixels, ends included; it reads 0 from the last pixel on."""
    data = {name: torch.from_numpy(np.asarray(v)) for name, v in np.load(GOLDEN).items()}
    patch, channels = int(data["ksize"]), data["image"].shape[1]
    sizes = torch.tensor(data["image"].shape[2:], dtype=torch.float64)
    image, mu = data["image"].double().requires_grad_(), data["mu"].double().requires_grad_()
    scale = 2 * patch * sizes / (sizes.sum() * (patch - 1))
    result = srt_ext.windows(image, mu * sizes + 0.5, (patch, patch), scale, padding="zeros")
    places = mu.detach() * sizes
    reach = (torch.arange(patch) - (patch - 1) / 2)[:, None] * scale
    places = places[:, :, None] + reach  # [B, N, P, 2] of pixel indices
    inside = ((places > 1e-4) & (places < sizes - 1 - 1e-4)).unbind(-1)
    inside = (inside[0][:, :, None, :, None] & inside[1][:, :, None, None, :]).expand_as(result)
    published = data["features"][:, :, :channels]
    assert inside.any()
    assert (result - published)[inside].abs().max() < 1e-5

    whole = inside.all(-1).all(-1).all(-1)  # windows whose gradients equal the published ones
    assert whole.any()
    grad = data["grad_features"][:, :, :channels].double()
    of_image, of_mu = torch.autograd.grad(result, (image, mu), grad)
    expected = data["grad_mu_window"].double()  # sums in float32, of size up to 800
    torch.testing.assert_close(of_mu[whole], expected[whole], atol=1e-3, rtol=1e-5)
    # Only pixels that no clamped window reads. Published positions are float32, which changes
    # each weight, and so its product with the gradient of a sample, by about 1e-6.
    reads = srt_ext.windows(image, mu.detach() * sizes + 0.5, (patch, patch), scale)
    others = (~whole)[:, :, None, None, None].double().expand_as(reads)
    alone = torch.autograd.grad(reads, image, others)[0] == 0
    assert alone.any()
    assert of_image[alone].any()
    torch.testing.assert_close(
        of_image[alone], data["grad_image"].double()[alone], atol=1e-4, rtol=1e-5
    )


# ---- sample -------------------------------------------------------------------------------------


@each_device
@pytest.mark.parametrize("stride", [1, (4, 2)])
def test_sample(device: str, stride: Any) -> None:
    """A field of any stride, sampled at points of the image."""
    sh, sw = (stride, stride) if isinstance(stride, int) else stride
    field = torch.randn(2, 19, 3, 5).contiguous(memory_format=torch.channels_last).to(device)
    points = torch.rand(2, 7, 2, device=device) * torch.tensor([3.0 * sh, 5.0 * sw], device=device)
    places = (points / torch.tensor([3.0 * sh, 5.0 * sw], device=device) * 2 - 1).flip(-1)
    expected = F.grid_sample(field, places[:, :, None], padding_mode="border", align_corners=False)
    result = srt_ext.sample(field, points, stride)
    torch.testing.assert_close(result, expected[..., 0].transpose(1, 2))
    cells = grid_centers((3, 5), (sh, sw)).expand(2, -1, -1).to(device)
    whole = srt_ext.sample(field, cells, stride)
    assert torch.equal(whole, field.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("stride", [1, 4, (4, 2)])
def test_errors_of_sample(stride: Any) -> None:
    """Errors are the same at every stride and name the arguments of ``sample``."""
    field, points = torch.ones(1, 2, 3, 5), torch.ones(1, 4, 2)
    points_rule, four = r"points must be \[B, N, 2\]; got ", "field must have 4 dimensions, "
    wrong: list[tuple[type[Exception], str, Any, Any]] = [
        (TypeError, "points must be a torch.Tensor; got list", field, [[[1.0, 1.0]]]),
        (TypeError, "points must be float32 or float64; got torch.int64", field, points.long()),
        (TypeError, "points must be float32 or float64; got torch.float16", field, points.half()),
        (ValueError, points_rule + r"\[4, 2\]", field, points[0]),
        (ValueError, points_rule + r"\[1, 4, 1\]", field, points[..., :1]),
        (TypeError, "field must be a torch.Tensor; got NoneType", None, points),
        (ValueError, four + r".*; got \[2, 3, 5\]", field[0], points),
    ]
    for error, rule, *arguments in wrong:
        with pytest.raises(error, match="^srt_ext.sample: " + rule):
            srt_ext.sample(*arguments, stride)
    far = torch.full((1, 4, 2), 2.0**25 * 1.01, dtype=torch.float64) * torch.tensor(stride)
    with pytest.raises(ValueError, match=r"centers must be finite and at most 2\^25 pixels"):
        srt_ext.sample(field, far, stride)
    srt_ext.sample(field, far / 1.02, stride)


# ---- derivatives --------------------------------------------------------------------------------


@each_padding
@pytest.mark.parametrize("scale", [None, (2,), (1, 3, 2)])
def test_gradcheck(scale: tuple[int, ...] | None, padding: str) -> None:
    generator = torch.Generator().manual_seed(5)
    image = torch.randn(1, 2, 5, 6, generator=generator, dtype=torch.float64)
    centers = torch.rand(1, 3, 2, generator=generator, dtype=torch.float64) * 6
    given = [image, centers]
    if scale is not None:
        given.append(torch.rand(scale, generator=generator, dtype=torch.float64) + 0.4)

    def function(image: Any, centers: Any, scale: Any = None) -> torch.Tensor:
        return srt_ext.windows(image, centers, (2, 3), scale, padding=padding)

    inputs = [g.requires_grad_() for g in given]
    assert gradcheck(function, inputs, eps=1e-7, check_batched_grad=True)

    def of_image(image: torch.Tensor) -> torch.Tensor:
        return function(image, *(g.detach() for g in given[1:]))

    assert gradcheck(of_image, inputs[:1], check_forward_ad=True, check_batched_forward_grad=True)
    assert torch.autograd.gradgradcheck(of_image, inputs[:1], check_fwd_over_rev=True)


def test_gradient_of_the_gradient_of_the_image() -> None:
    """Also with respect to the centers: the gradient of <windows(v), grad>."""
    image = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    centers = (torch.rand(1, 3, 2, dtype=torch.float64) * 5).requires_grad_()

    def function(grad: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
        result = srt_ext.windows(image, centers, (2, 2))
        return torch.autograd.grad(result, image, grad, create_graph=True)[0]

    grad = torch.randn(1, 3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(function, (grad, centers), eps=1e-7)


def test_derivatives_that_do_not_exist_are_errors() -> None:
    image = torch.randn(1, 2, 5, 6, requires_grad=True)
    centers, scale = torch.rand(1, 3, 2) * 5, torch.ones(2)
    for name, at in (("centers", centers), ("scale", scale)):
        given: dict[str, Any] = {"centers": centers, "scale": scale}

        def function(value: torch.Tensor, name: str = name, given: Any = given) -> torch.Tensor:
            places = {**given, name: value}
            return srt_ext.windows(image, places["centers"], (2, 2), places["scale"])

        rule = f"srt::windows has no forward-mode derivative with respect to {name}"
        with pytest.raises(RuntimeError, match=rule):
            torch.func.jvp(function, (at,), (at,))
        leaf = at.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(leaf).square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative that involves centers"):
            first.sum().backward()


def test_gradients_have_the_dtypes_of_their_inputs() -> None:
    for image_dtype, dtype in itertools.product(DTYPES, (torch.float32, torch.float64)):
        image = torch.randn(2, 3, 5, 6).to(image_dtype).requires_grad_()
        centers = (torch.rand(2, 4, 2, dtype=dtype) * 5).requires_grad_()
        scale = torch.ones(2, dtype=dtype, requires_grad=True)
        srt_ext.windows(image, centers, (3, 2), scale).sum().backward()
        for tensor in (image, centers, scale):
            assert tensor.grad is not None
            assert tensor.grad.shape == tensor.shape
            assert tensor.grad.dtype == tensor.dtype


# ---- empty, threads -----------------------------------------------------------------------------


@each_device
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_empty_inputs(device: str, shape: tuple[int, int, int]) -> None:
    batch, count, channels = shape
    image = torch.randn(batch, channels, 5, 6, device=device, requires_grad=True)
    centers = torch.full((batch, count, 2), 2.5, device=device, requires_grad=True)
    result = srt_ext.windows(image, centers, (3, 2))
    assert tuple(result.shape) == (batch, count, channels, 3, 2)
    assert result.stride() == torch.empty(result.shape).stride()
    result.sum().backward()
    for tensor in (image, centers):
        assert tensor.grad is not None
        assert not tensor.grad.any()


@pytest.mark.parametrize("layout", ["dense", "channels_last"])
def test_gradients_are_bitwise_equal_over_threads(
    layout: str, threads: Callable[[int], None], cpu_kernels: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    centers: Pairs = tuple(map(tuple, (torch.rand(40, 2, generator=generator) * 90).tolist()))
    case = Windows((70, 90), (16, 16), centers, channels=20, batch=1, layout=layout)
    for dtype, scale in itertools.product((torch.float32, torch.float16), (None, (1.0, 1.1))):
        one = replace(case, scale=scale)
        image, grad = one.image(dtype), torch.randn(one.shape).to(dtype)
        results = []
        for count in (1, 2, 7):
            threads(count)
            run = Ops("cpu")
            results.append([run.windows_points(one, grad, image), run.windows_backward(one, grad)])
        assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


# ---- paths of the CUDA kernels ------------------------------------------------------------------

WINDOW_KERNELS = ("windows", "windows_backward")


@pytest.mark.parametrize("channels", [16, 64, 66, 130, 1058])
@each_kernel(*WINDOW_KERNELS, backends=GPU)
def test_points_of_many_channels(kernel: str, channels: int, backend: Backend) -> None:
    """With and without vectors; more channels than a thread and than a block holds."""
    case = Windows((3, 35), (1, 1), random_views(9), channels=channels, layout="channels_last")
    for dtype in dtypes_of(kernel):
        for one in (case, replace(case, layout="dense"), replace(case, layout="sliced")):
            values = values_of(kernel, one, dtype)
            check(kernel, one, values, run(backend, kernel, one, values))
        unaligned = torch.empty(1 + values.numel(), dtype=dtype)[1:]
        unaligned = unaligned.as_strided(values.shape, torch.empty(values.shape).stride(), 1)
        unaligned.copy_(values)
        check(kernel, case, unaligned, run(backend, kernel, case, unaligned))


@pytest.mark.parametrize(
    "case",
    [
        Windows((5, 40), (1, 1), random_views(1300), channels=5, batch=1),
        Windows((5, 300), (2, 3), random_views(700), (1.0, 40.0), channels=5, batch=3),
        Windows((2, 20), (2, 1), random_views(300), channels=2, batch=70),
        Windows((40, 50), (20, 17), random_views(3), channels=18),
        Windows((40, 50), (1, 600), random_views(3), (1.0, 0.1), channels=18),
        Windows((40, 50), (600, 1), random_views(3), (-0.1, 1.0), channels=2),
    ],
    ids=lambda case: "x".join(map(str, (*case.shape, *case.size))),
)
@each_kernel(*WINDOW_KERNELS, backends=GPU)
def test_inputs_larger_than_a_block(kernel: str, case: Windows, backend: Backend) -> None:
    """Windows, samples, channels and pixels of several blocks; lines of several rounds."""
    values = values_of(kernel, case, torch.float32)
    check(kernel, case, values, run(backend, kernel, case, values))
    if kernel == "windows":
        image, grad = case.image(), torch.randn(case.shape)
        result = backend.windows_points(case, grad, image)
        bound = WindowsBounds(case, torch.float32).points(grad, image)
        assert_within_rounding(result, windows_points(case, grad, image), bound)


@each_kernel(*WINDOW_KERNELS, "windows_points", backends=GPU)
def test_results_are_bitwise_equal_wherever_centers_and_scale_are(
    kernel: str, backend: Backend
) -> None:
    for count, scale in ((6, None), (6, (1.0, 1.5)), (100, random_views(100)), (300, (2.0, 0.5))):
        case = Windows((11, 40), (2, 3), random_views(count), scale)
        grad, image = torch.randn(case.shape), case.image()

        def result(case: Windows, place: Any, grad: Any = grad, image: Any = image) -> torch.Tensor:
            values = {"windows": (image,), "windows_backward": (grad,)}
            return getattr(backend, kernel)(case, *values.get(kernel, (grad, image)), place=place)

        expected = result(case, "host")
        for value_dtype in (torch.float32, torch.float64):
            same = replace(case, value_dtype=value_dtype)
            for place in ("device", ("host", "device"), ("device", "host")):
                assert torch.equal(result(same, place), expected)


@each_gpu
@each_value_dtype
@pytest.mark.parametrize("window", [(3, 4), (1, 1)])
def test_invalid_values_on_the_device_give_windows_of_0(
    window: tuple[int, int], value_dtype: torch.dtype, backend: Backend
) -> None:
    """Values on the device are not validated."""
    ones, far = (1.0, 1.0), 2.0**25 * 1.01
    centers = ((4.3, 8.6), (np.nan, 3.0), (2.0, np.inf), (-far, 1.0), (3.3, far), (5.1, 2.0))
    good = Windows((9, 21), window, (*centers[::5], centers[0]), ones, value_dtype=value_dtype)
    cases = [replace(good, centers=(*centers, centers[0]))]
    scales = (ones, (np.nan, 1.0), (1.0, -np.inf), (2.0**20 * 1.01, 1.0), (1.0, -far), ones)
    cases.append(replace(good, centers=(*centers[:1] * 5, centers[5], centers[0])))
    cases[1] = replace(cases[1], scale=(*scales, ones))
    for case in (replace(one, batch=1) for one in cases):
        kept = replace(good, batch=1)
        image, grad = case.image(), torch.full(case.shape, torch.nan)
        valid = grad[:, (0, 5, 6)] = torch.randn(kept.shape)
        values = backend.windows(case, image, place="device")
        assert not values[:, 1:5].any()
        check("windows", kept, image, values[:, (0, 5, 6)])
        check("windows_backward", kept, valid, backend.windows_backward(case, grad, place="device"))
        points = backend.windows_points(case, grad, image, place="device")
        assert not points[:, :, 1:5].any()
        bound = WindowsBounds(kept, torch.float32).points(valid, image)
        expected = windows_points(kept, valid, image)
        assert_within_rounding(points[:, :, (0, 5, 6)], expected, bound)
