"""``srt_ext.shift``, ``windows``, ``ensemble``: ``torch.ops.srt.*`` with types, docs and errors.

Method: Lao et al., "Sub-token ViT Embedding via Stochastic Resonance Transformers", ICML 2024; of
``windows``: Hjelkrem-Tan et al., "SPoT: Subpixel Placement of Tokens in Vision Transformers", 2025.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NoReturn, cast

import torch

from ._library import cuda_unavailable
from ._validation import (
    MAX_VIEWS,
    check_cells,
    check_pair,
    check_tensor,
    check_words,
    stated_error,
    wrong,
)
from .options import OPTIONS, Border, Interpolation, Padding, Pair, Reduce, Stride, Upsample


def no_grad() -> AbstractContextManager[Any]:
    """``torch.no_grad`` where it changes something: torch.export cuts its graph at each."""
    return torch.no_grad() if torch.is_grad_enabled() else nullcontext()


@contextmanager
def state_mode() -> Iterator[None]:
    """For tensors that are kept: without gradients, and no inference tensors."""
    # torch.inference_mode(False) enables gradients, which torch.export does not see.
    inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    with torch.inference_mode(False) if inference else nullcontext(), no_grad():
        yield


def pair(op: str, name: str, value: Any) -> Any:
    """Converts ``value`` to integers that the dispatcher takes; C++ checks the other rules.

    The dispatcher reads bools and floating 0-d tensors as integers, and refuses a NumPy integer.
    """
    several = value if type(value) in (tuple, list) else (value,)
    if torch.compiler.is_compiling() or all(type(n) is int for n in several):
        return value
    return check_pair(f"srt::{op}", name, value)


def _explain(
    error: RuntimeError, op: str, schema: Any, args: Sequence[Any], modes: dict[str, Any]
) -> NoReturn:
    """Raises the ValueError or TypeError that the op states, or that an argument's type gives."""
    message = str(error)
    stated = stated_error(message)
    if stated is not None:
        raise stated from None
    if isinstance(error, NotImplementedError) and "'CUDA'" in message and cuda_unavailable:
        raise NotImplementedError(
            f"srt::{op}: CUDA kernels are not available: {cuda_unavailable}"
        ) from error
    _check_types(op, schema, *args, **modes)
    raise error


def _check_types(op: str, schema: Any, *args: object, **modes: object) -> None:
    """Raises for the argument whose type the dispatcher refused: a tensor, a pair or a word."""
    names = [argument.name for argument in schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **modes}
    for argument in schema.arguments:
        name, kind = argument.name, str(argument.type)
        value = given.get(name, argument.default_value)
        if kind == "Tensor" or (kind == "Optional[Tensor]" and value is not None):
            check_tensor(f"srt::{op}", name, value)
        elif kind == "List[int]":
            check_pair(f"srt::{op}", name, value)
        elif name in OPTIONS:  # a string may be no UTF-8
            check_words(f"srt::{op}", **{name: value})


def _call(name: str, op: Any, *args: Any, **modes: Any) -> Any:
    """Calls ``op``; for wrong arguments raises ValueError or TypeError that name ``name``."""
    if torch.compiler.is_compiling():
        return op(*args, **modes)
    try:
        return op(*args, **modes)
    except RuntimeError as error:
        _explain(error, name, op._schema, args, modes)


def accumulate(op: str, *args: Any, **modes: Any) -> None:
    """``torch.ops.srt.accumulate_*``, for srt_ext.streaming."""
    _call(op, getattr(torch.ops.srt, op).default, *args, **modes)


def check_views(
    op: str, *args: Any, reduce: str = "mean", stream: bool = False, **modes: Any
) -> None:
    """Checks tokens, offsets, grid, patch, weights and modes by the rules of ``op``.

    ``stream``: they are a chunk of a stream, which may have no views.
    """
    check = torch.ops.srt._check_views.default
    _call(op, check, op, *args, reduce=reduce, stream=stream, **modes)


def shift(
    image: torch.Tensor,
    offsets: torch.Tensor,
    *,
    padding: Padding = "reflect",
    interpolation: Interpolation = "bilinear",
) -> torch.Tensor:
    """Every translated view of a batch of images: ``view_v(y, x) = image(y - dy, x - dx)``.

    Args:
        image: [B, C, H, W], float32, float16, bfloat16, float64 or uint8.
        offsets: [V, 2], (dy, dx) in pixels, any real numbers up to 2^20 in size, V from 1 to 2^20;
            float32 or float64, on the CPU or on the device of ``image``. Content moves down and
            right by them. CUDA offsets are not validated (that would synchronise): a view with one
            that is not finite or too large is 0.
        padding: what lies beyond the image: ``zeros``, ``border``, ``reflect`` (the edge is not
            repeated) or ``circular``.
        interpolation: ``nearest``, ``bilinear`` or ``bicubic`` (a = -0.75). Whole-pixel offsets
            copy bit for bit under each, and offsets within 2^-40 of one count as it. uint8 results
            are rounded half to even and saturate.

    Returns:
        [V, B, C, H, W], dense, of the dtype of ``image``. Differentiable with respect to ``image``,
        as often as one likes, in reverse and forward mode.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, mode word or value.

    Example:
        >>> image = torch.arange(4.0).reshape(1, 1, 1, 4)
        >>> shift(image, torch.tensor([[0.0, 1.0], [0.0, 0.5]]), padding="border")[:, 0, 0, 0]
        tensor([[0.0000, 0.0000, 1.0000, 2.0000],
                [0.0000, 0.5000, 1.5000, 2.5000]])
    """
    op, modes = torch.ops.srt.shift.default, {"padding": padding, "interpolation": interpolation}
    return cast(torch.Tensor, _call("shift", op, image, offsets, **modes))


def windows(
    image: torch.Tensor,
    centers: torch.Tensor,
    size: Pair,
    scale: torch.Tensor | None = None,
    *,
    padding: Padding = "border",
) -> torch.Tensor:
    """Windows of a batch of images at any positions, sampled bilinearly: sub-pixel tokens (SPoT).

    Sample (i, j) of a window lies at ``center + ((i, j) - (size - 1) / 2) * scale``, in pixels;
    the centre of a pixel is its index + 0.5. So the windows of size ``patch`` with the centers
    ``patch * (k + 0.5)`` are the patches of a ViT, bit for bit, and those moved by ``d`` are the
    patches of ``shift(image, -d)``.

    Args:
        image: [B, C, H, W] of any strides, H and W at least 1; float32, float16, bfloat16, float64
            or uint8. It is read in place: a field of many channels best in channels_last.
        centers: [B, N, 2], (y, x) in pixels, finite and at most 2^25 in size; they may lie outside
            of the image. B * N up to 2^26; float32 or float64, on the CPU or on the device of
            ``image``. On a GPU they and ``scale`` are not validated (that would synchronise): a
            window with one that is not finite or too large is 0.
        size: (Ph, Pw), samples of a window; (1, 1) samples the image at the centers.
        scale: pixels from sample to sample, (y, x): [2] for all windows or [B, N, 2] for each;
            finite and at most 2^20 in size, negative ones mirror the window; float32 or float64;
            None for 1. There is no antialiasing.
        padding: what lies beyond the image, by pixel: ``zeros``, ``border``, ``reflect`` (the edge
            is not repeated) or ``circular``.

    Returns:
        [B, N, C, Ph, Pw], dense, of the dtype of ``image``. Positions are float64; one within 2^-40
        of the centre of a pixel is that pixel, so windows of whole pixels are copies bit for bit.
        uint8 results are rounded half to even.

        Differentiable with respect to ``image``, ``centers`` and ``scale``; at the centre of a
        pixel the derivative is the one to the right, as that of ``F.grid_sample``. The gradients of
        the image are differentiable again, those of the others are not; forward mode knows the
        image alone.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, mode word or value.

    Example:
        >>> image = torch.arange(6.0).reshape(1, 1, 1, 6)
        >>> windows(image, torch.tensor([[[0.5, 2.0], [0.5, 3.25]]]), (1, 2))[0, :, 0, 0]
        tensor([[1.0000, 2.0000],
                [2.2500, 3.2500]])
    """
    args = (image, centers, pair("windows", "size", size), scale)
    op = torch.ops.srt.windows.default
    return cast(torch.Tensor, _call("windows", op, *args, padding=padding))


def sample(field: torch.Tensor, points: torch.Tensor, stride: Stride = 1) -> torch.Tensor:
    """Samples a dense field bilinearly at points of the picture.

    Args:
        field: [B, C, H', W'], as of :func:`ensemble`; float32, float16, bfloat16, float64 or uint8.
            Of channels_last, which :func:`ensemble` returns, a point reads whole rows of channels.
        points: [B, N, 2], (y, x) in pixels of the picture, float32 or float64; as the centers of
            :func:`windows`, but the bound of 2^25 is on points / stride.
        stride: pixels per cell of the field, (sh, sw) or one for both, as given to
            :func:`ensemble`.

    Returns:
        [B, N, C] of the dtype of ``field``; a point beyond the centres of the outer cells has their
        value. Differentiable as :func:`windows`.

    Raises:
        TypeError, ValueError: as :func:`windows`, whose centers are points / stride.

    Example:
        >>> field = torch.tensor([[1.0, 3.0]]).reshape(1, 1, 1, 2)  # two cells of 4 x 4 pixels
        >>> sample(field, torch.tensor([[[2.0, 2.0], [2.0, 3.0]]]), stride=4)[0, :, 0]
        tensor([1.0000, 1.5000])
    """
    where, rule = "srt_ext.sample", "points must be float32 or float64"
    for name, tensor in (("field", field), ("points", points)):
        check_tensor(where, name, tensor)
    _check_rank(where, "field", field, 4, "must have 4 dimensions, [B, C, H', W']")
    if points.dtype not in (torch.float32, torch.float64):
        raise wrong(TypeError, where, rule, points.dtype)
    if points.dim() != 3 or points.shape[2] != 2:
        raise wrong(ValueError, where, "points must be [B, N, 2]", list(points.shape))
    sh, sw = check_pair(where, "stride", stride)
    if (sh, sw) != (1, 1):
        points = torch.stack([points[..., 0].double() / sh, points[..., 1].double() / sw], -1)
    return windows(field, points, (1, 1)).flatten(2)


def ensemble(
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    grid: Pair,
    patch: Pair,
    weights: torch.Tensor | None = None,
    *,
    reduce: Reduce = "mean",
    upsample: Upsample = "bilinear",
    border: Border = "coverage",
    stride: Stride = 1,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The tokens of all views, moved back into the frame of the image and aggregated.

    The image has ``H = h * Ph`` by ``W = w * Pw`` pixels. Each output cell is the mean, over the
    pixels of the cell and the views that cover them, of the upsampled and inversely translated
    tokens. No pixel-scale map of a view is ever made.

    A mean at stride 1 is a running sum along rows and columns, begun anew every 16 pixels or less.
    Its rounding is that of the largest token near the cell, also of one that the cell does not
    read: at most 2^-22 of it.

    Args:
        tokens: [V, B, N, C], N = h * w tokens in row order, V from 1 to 2^20 views; float32,
            float16, bfloat16 or float64. The last dimension is dense; other strides are free, so
            ``out[:, :, prefix:]`` is read in place. Sums are kept in float32 (float64 for float64).
        offsets: [V, 2], (dy, dx) in pixels by which the content of each view moved, as given to
            :func:`shift`; float32 or float64, on the CPU or on the device of ``tokens``. On a GPU
            they and ``weights`` are not validated (that would synchronise): a view with values that
            are errors on the CPU (not finite, too large, negative) counts nowhere.
        grid: (h, w), tokens.
        patch: (Ph, Pw), pixels from token to token.
        weights: [V], finite and >= 0, float32 or float64, none but 0 below 2^-80 of the largest;
            None for equal weights. A view of weight 0 is not read.
        reduce: ``mean`` or ``median``: the lower median over the views that cover the cell, exact,
            NaN where one of them is (as ``torch.median``); it takes no weights.
        upsample: ``nearest`` or ``bilinear`` (``F.interpolate`` with ``align_corners=False``).
        border: a pixel that a view does not cover is left out (``coverage``), counts as 0
            (``zeros``, as published), reads the nearest edge token (``clamp``), or reads the tokens
            as if they went on at the opposite edge (``circular``, for views that :func:`shift` made
            with ``padding="circular"``).
        stride: pixels per output cell, (sh, sw) or one for both; divides (H, W). 1 is pixel scale,
            ``patch`` is token scale.
        out: [B, C, H / sh, W / sw], written in place; any strides that step over what the smaller
            ones span, channels_last is the fast one. Not differentiable. (Under ``torch.compile``
            torch 2.10 and 2.13 refuse one that is channels_last.)

    Returns:
        [B, C, H / sh, W / sw] of the dtype of ``tokens``, with strides (H'W'C, 1, W'C, C)
        (channels_last), or ``out``. 0 where no view counts. Differentiable with respect to
        ``tokens`` and ``weights`` in reverse and forward mode. The gradient of a mean has a kernel;
        that of a median, and those of weights, are recomputed view by view, which takes tens of
        times as long as the forward. The gradient of a median goes to the view that is the median
        (the first by dx of equal ones).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, mode word or value.

    Example:
        >>> tokens = torch.tensor([0.0, 4.0]).reshape(1, 1, 2, 1)
        >>> ensemble(tokens, torch.zeros(1, 2), grid=(1, 2), patch=(1, 4))[0, 0, 0]
        tensor([0.0000, 0.0000, 0.5000, 1.5000, 2.5000, 3.5000, 4.0000, 4.0000])
    """
    name, op = "ensemble", torch.ops.srt.ensemble
    args = (tokens, offsets, pair(name, "grid", grid), pair(name, "patch", patch), weights)
    modes = {"upsample": upsample, "border": border, "stride": pair(name, "stride", stride)}
    if out is None:
        return cast(torch.Tensor, _call(name, op.default, *args, **modes, reduce=reduce))
    _call(name, op.out, *args, **modes, reduce=reduce, out=out)
    return out


def ensemble_moments(
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    grid: Pair,
    patch: Pair,
    weights: torch.Tensor | None = None,
    *,
    upsample: Upsample = "bilinear",
    border: Border = "coverage",
    stride: Stride = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean over the views and their variance, from one reading of the tokens.

    The variance is the weighted population variance of what the views say about a cell: the norm of
    its root over the channels is the noise map of the paper. In float32, beside a mean of 1e4 times
    the spread, it is within 0.2 %: as far as the interpolated values themselves are rounded (1e-6
    where they are copies: ``nearest`` at stride 1).

    Args:
        tokens, offsets, grid, patch, weights, upsample, border, stride: as for :func:`ensemble`.

    Returns:
        (mean, var), each as the result of :func:`ensemble`. Both are 0 where no view counts.
        Differentiable with respect to ``tokens`` and ``weights``, recomputed view by view.

    Raises:
        TypeError, ValueError: as :func:`ensemble`.

    Example:
        >>> tokens = torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1)  # two views of one token
        >>> mean, var = ensemble_moments(tokens, torch.zeros(2, 2), grid=(1, 1), patch=(1, 1))
        >>> mean.item(), var.item()
        (2.0, 1.0)
    """
    name, op = "ensemble_moments", torch.ops.srt.ensemble_moments.default
    args = (tokens, offsets, pair(name, "grid", grid), pair(name, "patch", patch), weights)
    modes = {"upsample": upsample, "border": border, "stride": pair(name, "stride", stride)}
    mean, var = _call(name, op, *args, **modes)
    return mean, var


# ---- fake kernels -------------------------------------------------------------------------------
# They know the rules that the shape of a result follows from. The ops check all, when they run.

Size = int | torch.SymInt


def field_shape(
    op: str,
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    grid: Pair,
    patch: Pair,
    weights: torch.Tensor | None = None,
    *,
    stride: Stride = 1,
    **_modes: object,
) -> list[int]:
    """[B, C, H', W'] of the field that the op makes of these arguments."""
    where = f"srt::{op}"
    _check_rank(where, "tokens", tokens, 4, "must have 4 dimensions, [V, B, N, C]")
    _check_view_count(where, "tokens", tokens)
    _, batch, count, channels = tokens.shape
    grid = check_pair(where, "grid", grid)
    cells = check_cells(where, grid, patch, stride)
    if grid[0] * grid[1] != count:
        rule = f"grid must hold the N = {count} tokens of a view, without class or register tokens"
        raise wrong(ValueError, where, rule, list(grid))
    _check_meta(where, tokens, offsets=offsets, weights=weights)
    return [batch, channels, *cells]


def _check_rank(where: str, name: str, tensor: torch.Tensor, rank: int, rule: str) -> None:
    if tensor.dim() != rank:
        raise wrong(ValueError, where, f"{name} {rule}", list(tensor.shape))


def _check_view_count(where: str, name: str, tensor: torch.Tensor) -> None:
    """The limit of the views, [V, ...]; a symbolic V is left to the op, for it would be a guard."""
    count: Size = tensor.shape[0]
    if isinstance(count, int) and count > MAX_VIEWS:
        rule = f"{name} must hold at most 2^20 views"
        raise wrong(ValueError, where, rule, list(tensor.shape))


def _differs(shape: Sequence[Size], wanted: Sequence[Size]) -> bool:
    """Whether a shape is not the wanted one; a symbolic size is left to the op, as above."""
    return len(shape) != len(wanted) or any(
        isinstance(a, int) and isinstance(b, int) and a != b
        for a, b in zip(shape, wanted, strict=True)
    )


def _check_meta(where: str, given: torch.Tensor, **numbers: torch.Tensor | None) -> None:
    """One tensor on the meta device is enough to get here, where results have no values."""
    for name, values in numbers.items():
        if values is not None and values.is_meta and not given.is_meta:
            rule = f"{name} must be on the CPU or on the device of the input"
            raise wrong(ValueError, where, rule, values.device)


def _check_written(where: str, tokens: torch.Tensor, **written: torch.Tensor) -> None:
    """If one were on the meta device, the call would write nothing and raise no error."""
    for name, tensor in written.items():
        if tensor.is_meta != tokens.is_meta:
            rule = f"{name} must be on the device of tokens"
            raise wrong(ValueError, where, rule, tensor.device)


def _new_field(op: str, tokens: torch.Tensor, *args: Any, **modes: Any) -> torch.Tensor:
    _, channels, height, width = shape = field_shape(op, tokens, *args, **modes)
    # As the schema promises, also where a size is 0 or 1: channels_last.
    strides = (height * width * channels, 1, width * channels, channels)
    return tokens.new_empty_strided(shape, strides)


@torch.library.register_fake("srt::shift")
def _(image: torch.Tensor, offsets: torch.Tensor, **modes: Any) -> torch.Tensor:
    _check_rank("srt::shift", "image", image, 4, "must have 4 dimensions, [B, C, H, W]")
    _check_rank("srt::shift", "offsets", offsets, 2, "must be [V, 2] with V >= 1")
    _check_view_count("srt::shift", "offsets", offsets)
    _check_meta("srt::shift", image, offsets=offsets)
    return image.new_empty([offsets.shape[0], *image.shape])


def _windows_shape(
    op: str, image: torch.Tensor, centers: torch.Tensor, size: Pair, scale: torch.Tensor | None
) -> list[Any]:
    """[B, N, C, Ph, Pw]."""
    where = f"srt::{op}"
    _check_rank(where, "image", image, 4, "must have 4 dimensions, [B, C, H, W]")
    if _differs(centers.shape, (image.shape[0], *centers.shape[1:2], 2)):
        rule = f"centers must be [B, N, 2] with B = {image.shape[0]}"
        raise wrong(ValueError, where, rule, list(centers.shape))
    if scale is not None and _differs(scale.shape, (2,)) and _differs(scale.shape, centers.shape):
        rule = f"scale must be [2] or have the shape of centers, {list(centers.shape)}"
        raise wrong(ValueError, where, rule, list(scale.shape))
    _check_meta(where, image, centers=centers, scale=scale)
    return [image.shape[0], centers.shape[1], image.shape[1], *check_pair(where, "size", size)]


@torch.library.register_fake("srt::windows")
def _(
    image: torch.Tensor,
    centers: torch.Tensor,
    size: Pair,
    scale: torch.Tensor | None = None,
    **modes: Any,
) -> torch.Tensor:
    return image.new_empty(_windows_shape("windows", image, centers, size, scale))


@torch.library.register_fake("srt::ensemble")
def _(*args: Any, **modes: Any) -> torch.Tensor:
    return _new_field("ensemble", *args, **modes)


@torch.library.register_fake("srt::ensemble_moments")
def _(*args: Any, **modes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    mean, var = (_new_field("ensemble_moments", *args, **modes) for _ in range(2))
    return mean, var


@torch.library.register_fake("srt::ensemble.out")
def _(*args: Any, out: torch.Tensor, **modes: Any) -> None:
    shape = field_shape("ensemble", *args, **modes)
    if list(out.shape) != shape:
        raise wrong(ValueError, "srt::ensemble", f"out must be {shape}", list(out.shape))
    _check_written("srt::ensemble", args[0], out=out)


def _fake_accumulate(op: str, names: Sequence[str], *args: Any, **modes: Any) -> None:
    """``names`` of the tensors of the state, the first arguments."""
    state, views = args[: len(names)], args[len(names) :]
    field_shape(op, *views, **modes)
    _check_written(f"srt::{op}", views[0], **dict(zip(names, state, strict=True)))


for _op in ("mean", "moments", "median"):
    _name = f"accumulate_{_op}_"
    _arguments = getattr(torch.ops.srt, _name).default._schema.arguments
    _state = [a.name for a in _arguments if a.alias_info is not None]
    torch.library.register_fake(f"srt::{_name}", partial(_fake_accumulate, _name, _state))


@torch.library.register_fake("srt::_check_views")
def _(*args: Any, **modes: Any) -> None:
    field_shape(*args, **modes)


@torch.library.register_fake("srt::_shift_backward")
def _(grad: torch.Tensor, offsets: torch.Tensor, **modes: Any) -> torch.Tensor:
    _check_rank("srt::_shift_backward", "grad", grad, 5, "must have 5 dimensions, [V, B, C, H, W]")
    _check_meta("srt::_shift_backward", grad, offsets=offsets)
    return grad.new_empty(grad.shape[1:])


@torch.library.register_fake("srt::_windows_backward_image")
def _(
    grad: torch.Tensor, centers: torch.Tensor, pixels: Pair, scale: Any, **modes: Any
) -> torch.Tensor:
    where = "srt::_windows_backward_image"
    _check_rank(where, "grad", grad, 5, "must have 5 dimensions, [B, N, C, Ph, Pw]")
    _check_meta(where, grad, centers=centers, scale=scale)
    return grad.new_empty([grad.shape[0], grad.shape[2], *pixels])


@torch.library.register_fake("srt::_windows_backward_points")
def _(
    grad: torch.Tensor, image: torch.Tensor, centers: torch.Tensor, scale: Any, **modes: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    where = "srt::_windows_backward_points"
    _check_rank(where, "grad", grad, 5, "must have 5 dimensions, [B, N, C, Ph, Pw]")
    _check_meta(where, grad, centers=centers, scale=scale)
    shape = centers.shape
    return tuple(image.new_empty(shape, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


@torch.library.register_fake("srt::_mean_backward")
def _(
    grad: torch.Tensor,
    offsets: Any,
    grid: Pair,
    patch: Pair,
    weights: Any,
    **modes: Any,
) -> torch.Tensor:
    _check_rank("srt::_mean_backward", "grad", grad, 4, "must have 4 dimensions, [B, C, H', W']")
    _check_meta("srt::_mean_backward", grad, offsets=offsets, weights=weights)
    grid = check_pair("srt::_mean_backward", "grid", grid)
    return grad.new_empty(offsets.shape[0], grad.shape[0], grid[0] * grid[1], grad.shape[1])
