"""Typed and documented functions over ``torch.ops.srt.*``, with Python's kinds of errors.

``shift``, ``ensemble`` and ``ensemble_moments`` implement Lao et al., "Sub-token ViT Embedding via
Stochastic Resonance Transformers", ICML 2024; ``windows`` implements Hjelkrem-Tan et al., "SPoT:
Subpixel Placement of Tokens in Vision Transformers", 2025.
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
    """``torch.no_grad``, only if gradients are enabled: torch.export cuts its graph at each use."""
    return torch.no_grad() if torch.is_grad_enabled() else nullcontext()


@contextmanager
def state_mode() -> Iterator[None]:
    """A context in which stored tensors are created: no gradients, no inference tensors."""
    # torch.inference_mode(False) enables gradients, which torch.export does not see.
    inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    with torch.inference_mode(False) if inference else nullcontext(), no_grad():
        yield


def pair(op: str, name: str, value: Any) -> Any:
    """Converts ``value`` to Python integers, for the dispatcher. C++ checks the other rules.

    The dispatcher reads bools and floating 0-d tensors as integers and rejects NumPy integers.
    """
    several = value if type(value) in (tuple, list) else (value,)
    if torch.compiler.is_compiling() or all(type(n) is int for n in several):
        return value
    return check_pair(f"srt::{op}", name, value)


def _explain(
    error: RuntimeError, op: str, schema: Any, args: Sequence[Any], modes: dict[str, Any]
) -> NoReturn:
    """Raises the ValueError or TypeError that ``error`` states or a wrong argument type causes."""
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
    """Raises an error for the argument (tensor, pair or string) that the dispatcher rejected."""
    names = [argument.name for argument in schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **modes}
    for argument in schema.arguments:
        name, kind = argument.name, str(argument.type)
        value = given.get(name, argument.default_value)
        if kind == "Tensor" or (kind == "Optional[Tensor]" and value is not None):
            check_tensor(f"srt::{op}", name, value)
        elif kind == "List[int]":
            check_pair(f"srt::{op}", name, value)
        elif name in OPTIONS:  # the dispatcher rejects strings that are not UTF-8
            check_words(f"srt::{op}", **{name: value})


def _call(name: str, op: Any, *args: Any, **modes: Any) -> Any:
    """Calls ``op``. Wrong arguments raise a ValueError or TypeError that names the op ``name``."""
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

    ``stream``: the arguments are a chunk of a stream, which may have no views.
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
    """Translates a batch of images by each offset: ``view_v(y, x) = image(y - dy, x - dx)``.

    The views are those of Lao et al., "Sub-token ViT Embedding via Stochastic Resonance
    Transformers", ICML 2024.

    Args:
        image: [B, C, H, W], float32, float16, bfloat16, float64 or uint8.
        offsets: [V, 2], (dy, dx) in pixels; any real numbers with magnitude at most 2^20, V from 1
            to 2^20; float32 or float64, on the CPU or on the device of ``image``. Positive offsets
            move the content down and right. CUDA offsets are not validated (that would
            synchronise); an offset that is not finite or too large yields an all-zero view.
        padding: the values outside the image: ``zeros``, ``border``, ``reflect`` (the edge is not
            repeated) or ``circular``.
        interpolation: ``nearest``, ``bilinear`` or ``bicubic`` (a = -0.75). Whole-pixel offsets
            yield exact copies in every mode; an offset within 2^-40 of a whole pixel counts as
            whole. uint8 results are rounded half to even and saturate.

    Returns:
        [V, B, C, H, W], contiguous, in the dtype of ``image``. Differentiable with respect to
        ``image``, in reverse and forward mode, to any order.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has a wrong shape or value.

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
    """Samples windows of a batch of images bilinearly at any positions: sub-pixel tokens (SPoT).

    Sample (i, j) of a window is taken at ``center + ((i, j) - (size - 1) / 2) * scale``, in pixels.
    The centre of a pixel is its index + 0.5. Windows of size ``patch`` with the centers
    ``patch * (k + 0.5)`` are therefore bitwise equal to the patches of a ViT, and the same windows
    moved by ``d`` are the patches of ``shift(image, -d)``.

    The windows are the tokens of Hjelkrem-Tan et al., "SPoT: Subpixel Placement of Tokens in Vision
    Transformers", 2025.

    Args:
        image: [B, C, H, W] with any strides, H and W at least 1; float32, float16, bfloat16,
            float64 or uint8. It is read in place; channels_last is the fastest layout for a field
            with many channels.
        centers: [B, N, 2], (y, x) in pixels, inside or outside the image; finite, with magnitude at
            most 2^25; float32 or float64, on the CPU or on the device of ``image``. B * N is at
            most 2^26. CUDA centers and scales are not validated (that would synchronise); a value
            that is not finite or too large yields an all-zero window.
        size: (Ph, Pw), samples per window; (1, 1) samples the image at the centers.
        scale: pixels between neighbouring samples, (y, x): [2] for all windows or [B, N, 2] for
            each; finite, with magnitude at most 2^20; negative values mirror the window; float32 or
            float64. None means 1. There is no antialiasing.
        padding: the values of pixels outside the image: ``zeros``, ``border``, ``reflect`` (the
            edge is not repeated) or ``circular``.

    Returns:
        [B, N, C, Ph, Pw], contiguous, in the dtype of ``image``. Positions are computed in float64;
        a position within 2^-40 of the centre of a pixel reads that pixel alone, so windows on whole
        pixels are exact copies. uint8 results are rounded half to even.

        Differentiable with respect to ``image``, ``centers`` and ``scale``. At the centre of a
        pixel the derivative is the right-hand one, as in ``F.grid_sample``. The gradient with
        respect to ``image`` is differentiable again; the others are not. Forward mode supports
        ``image`` only.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has a wrong shape or value.

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
    """Samples a dense field bilinearly at points of the image.

    Args:
        field: [B, C, H', W'], for example from :func:`ensemble`; float32, float16, bfloat16,
            float64 or uint8. The fastest layout is channels_last, which :func:`ensemble` returns:
            the channels of a cell are then contiguous.
        points: [B, N, 2], (y, x) in pixels of the image, float32 or float64. The rules of the
            centers of :func:`windows` apply to ``points / stride``.
        stride: pixels per cell of the field, (sh, sw) or one for both, as passed to
            :func:`ensemble`.

    Returns:
        [B, N, C] in the dtype of ``field``. Points beyond the centres of the outermost cells are
        clamped to these centres. Differentiable as :func:`windows`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has a wrong shape or value.

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
    """Moves the tokens of all views back into the frame of the image and aggregates them.

    The image has ``H = h * Ph`` by ``W = w * Pw`` pixels. The tokens of each view are upsampled and
    translated back by its offset; an output cell is their mean over the pixels of the cell and the
    views that cover them. Per-view pixel maps are never materialised.

    A mean at stride 1 is a running sum along rows and columns, restarted at least every 16 pixels.
    Its rounding error is relative to the largest token near the cell, including tokens that the
    cell does not read: at most 2^-22 of that token.

    The method is that of Lao et al., "Sub-token ViT Embedding via Stochastic Resonance
    Transformers", ICML 2024.

    Args:
        tokens: [V, B, N, C], N = h * w tokens in row order, V from 1 to 2^20 views; float32,
            float16, bfloat16 or float64. The last dimension must be contiguous; other strides are
            free, so ``out[:, :, prefix:]`` is read in place. Sums are accumulated in float32
            (float64 for float64 tokens).
        offsets: [V, 2], (dy, dx) in pixels by which the content of each view moved, as passed to
            :func:`shift`; float32 or float64, on the CPU or on the device of ``tokens``. CUDA
            offsets and weights are not validated (that would synchronise); a view with an invalid
            value (not finite, too large or negative) does not count.
        grid: (h, w), the number of tokens along y and x.
        patch: (Ph, Pw), pixels per token.
        weights: [V], finite and >= 0, float32 or float64; each is 0 or at least 2^-80 times
            the largest. None means equal weights. A view of weight 0 is not read.
        reduce: ``mean``, or ``median``: the exact lower median over the views that cover the cell,
            NaN if one of their values is NaN (as ``torch.median``). The median does not support
            weights.
        upsample: ``nearest`` or ``bilinear`` (``F.interpolate`` with ``align_corners=False``).
        border: the rule for pixels that a view does not cover. ``coverage`` leaves them out,
            ``zeros`` counts them as 0 (as the published code), ``clamp`` reads the nearest edge
            token, ``circular`` wraps to the opposite edge (for views from :func:`shift` with
            ``padding="circular"``).
        stride: pixels per output cell, (sh, sw) or one for both; it must divide (H, W). 1 is pixel
            scale, ``patch`` is token scale.
        out: [B, C, H / sh, W / sw], written in place. Any strides are supported if each is at
            least the extent of the dimensions with smaller strides; channels_last is the fastest
            layout. Not differentiable. Under ``torch.compile``, torch 2.10 and 2.13 reject a
            channels_last ``out``.

    Returns:
        [B, C, H', W'] with H' = H / sh and W' = W / sw, in the dtype of ``tokens`` and with strides
        (H'W'C, 1, W'C, C) (channels_last), or ``out``. Cells in which no view counts are 0.

        Differentiable with respect to ``tokens`` and ``weights`` in reverse and forward mode. The
        gradient of the mean has a kernel. The gradients of the median and of weights are recomputed
        view by view, which takes tens of times as long as the forward pass. The gradient of a
        median goes to the view that is the median (the one with the smallest dx if several are
        equal).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has a wrong shape or value.

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
    """Computes the mean over the views and their variance from one read of the tokens.

    The variance is the weighted population variance of the views' values of a cell. The norm of its
    square root over the channels is the noise map of Lao et al., ICML 2024. In float32 it is
    accurate within 0.2 % if the mean is 1e4 times the standard deviation: the limit is the rounding
    of the interpolated values (with ``nearest`` at stride 1, which copies values, it is 1e-6).

    Args:
        tokens: [V, B, N, C], as for :func:`ensemble`.
        offsets: [V, 2], (dy, dx) in pixels, as for :func:`ensemble`.
        grid: (h, w), the number of tokens along y and x.
        patch: (Ph, Pw), pixels per token.
        weights: [V] or None, as for :func:`ensemble`.
        upsample: as for :func:`ensemble`.
        border: as for :func:`ensemble`.
        stride: pixels per output cell, as for :func:`ensemble`.

    Returns:
        (mean, var), each [B, C, H / sh, W / sw] as the result of :func:`ensemble`. Cells in which
        no view counts are 0. Differentiable with respect to ``tokens`` and ``weights``; the
        gradients are recomputed view by view.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has a wrong shape or value.

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
# They check only the rules that determine the shape of a result. The ops check the others.

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
    """Returns the shape [B, C, H', W'] of the field that the op computes."""
    where = f"srt::{op}"
    _check_rank(where, "tokens", tokens, 4, "must have 4 dimensions, [V, B, N, C]")
    _check_view_count(where, "tokens", tokens)
    _, batch, count, channels = tokens.shape
    grid = check_pair(where, "grid", grid)
    cells = check_cells(where, grid, patch, stride)
    if grid[0] * grid[1] != count:
        rule = f"tokens must have N = h * w = {grid[0] * grid[1]} for grid {list(grid)}, without"
        rule = f"{rule} class or register tokens"
        raise wrong(ValueError, where, rule, list(tokens.shape))
    _check_meta(where, tokens, offsets=offsets, weights=weights)
    return [batch, channels, *cells]


def _check_rank(where: str, name: str, tensor: torch.Tensor, rank: int, rule: str) -> None:
    if tensor.dim() != rank:
        raise wrong(ValueError, where, f"{name} {rule}", list(tensor.shape))


def _check_view_count(where: str, name: str, tensor: torch.Tensor) -> None:
    """Checks V in [V, ...]. A check of a symbolic V would add a guard; it is left to the op."""
    count: Size = tensor.shape[0]
    if isinstance(count, int) and count > MAX_VIEWS:
        rule = f"{name} must hold at most 2^20 views"
        raise wrong(ValueError, where, rule, list(tensor.shape))


def _differs(shape: Sequence[Size], wanted: Sequence[Size]) -> bool:
    """Whether two shapes differ. Symbolic sizes are left to the op, as above."""
    return len(shape) != len(wanted) or any(
        isinstance(a, int) and isinstance(b, int) and a != b
        for a, b in zip(shape, wanted, strict=True)
    )


def _check_meta(where: str, given: torch.Tensor, **numbers: torch.Tensor | None) -> None:
    """Rejects meta offsets of real tensors: the result would be uninitialised memory."""
    for name, values in numbers.items():
        if values is not None and values.is_meta and not given.is_meta:
            rule = f"{name} must be on the CPU or on the device of the input"
            raise wrong(ValueError, where, rule, values.device)


def _check_written(where: str, tokens: torch.Tensor, **written: torch.Tensor) -> None:
    """Rejects a mix of meta and real tensors: the call would write nothing and raise no error."""
    for name, tensor in written.items():
        if tensor.is_meta != tokens.is_meta:
            rule = f"{name} must be on the device of tokens"
            raise wrong(ValueError, where, rule, tensor.device)


def _new_field(op: str, tokens: torch.Tensor, *args: Any, **modes: Any) -> torch.Tensor:
    _, channels, height, width = shape = field_shape(op, tokens, *args, **modes)
    # channels_last, with exactly the documented strides even if a size is 0 or 1.
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
    """``names``: of the state tensors, which are the first arguments."""
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
