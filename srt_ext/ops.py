"""``srt_ext.shift`` and ``srt_ext.ensemble``: ``torch.ops.srt.*`` with types, docs and errors.

Method: Lao et al., "Sub-token ViT Embedding via Stochastic Resonance Transformers", ICML 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, cast

import torch

from ._library import cuda_unavailable
from .checks import check_ensemble, check_shift, check_state, check_views

_PREFIX = "srt::"


def _explain(error: RuntimeError, op: str, check: Callable[[], object]) -> NoReturn:
    """Raises what the metadata checks say, or a ValueError for a value that the op refused.

    The checks run only after a failure: a valid call does not pay for them.
    """
    check()
    message = str(error)
    if isinstance(error, NotImplementedError) and "'CUDA'" in message and cuda_unavailable:
        raise NotImplementedError(
            f"{_PREFIX}{op}: CUDA kernels are not available: {cuda_unavailable}"
        ) from error
    if f"{_PREFIX}{op}: " in message and f"{_PREFIX}{op}: CUDA: " not in message:
        raise ValueError(message[message.index(_PREFIX) :].splitlines()[0]) from None
    raise error


def shift(
    image: torch.Tensor,
    offsets: torch.Tensor,
    *,
    padding: str = "reflect",
    interpolation: str = "bilinear",
) -> torch.Tensor:
    """Every translated view of a batch of images: ``view_v(y, x) = image(y - dy, x - dx)``.

    Args:
        image: [B, C, H, W], float32, float16, bfloat16, float64 or uint8.
        offsets: [V, 2], (dy, dx) in pixels, any real numbers up to 2^20 in size; float32 or
            float64, on the CPU or on the device of ``image``. Content moves down and right by them.
            On a GPU nobody waits for their values: a view that a CPU tensor could not ask for is 0.
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
    if torch.compiler.is_compiling():
        return cast(
            torch.Tensor,
            torch.ops.srt.shift(image, offsets, padding=padding, interpolation=interpolation),
        )
    try:
        views: torch.Tensor = torch.ops.srt.shift(
            image, offsets, padding=padding, interpolation=interpolation
        )
        return views
    except RuntimeError as error:
        _explain(error, "shift", lambda: check_shift(image, offsets, padding, interpolation))


def ensemble(
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    grid: Sequence[int],
    patch: Sequence[int],
    weights: torch.Tensor | None = None,
    *,
    reduce: str = "mean",
    upsample: str = "bilinear",
    border: str = "coverage",
    stride: int | Sequence[int] = 1,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The tokens of all views, moved back into the frame of the image and aggregated.

    The image has ``H = h * Ph`` by ``W = w * Pw`` pixels. Each output cell is the mean, over the
    pixels of the cell and the views that cover them, of the upsampled and inversely translated
    tokens. No pixel-scale map of a view is ever made.

    Args:
        tokens: [V, B, N, C], N = h * w tokens in row order; float32, float16, bfloat16 or float64.
            The last dimension is dense; other strides are free, so ``out[:, :, prefix:]`` is read
            in place. Sums are kept in float32 (float64 for float64).
        offsets: [V, 2], (dy, dx) in pixels by which the content of each view moved, as given to
            :func:`shift`; float32 or float64, on the CPU or on the device of ``tokens``. On a GPU
            nobody waits for their values, nor for those of ``weights``: where a CPU tensor would be
            an error (not finite, too large, negative), the view counts nowhere.
        grid: (h, w), tokens.
        patch: (Ph, Pw), pixels from token to token.
        weights: [V], finite and >= 0, float32 or float64, none but 0 below 2^-80 of the largest;
            None for equal weights. A view of weight 0 is not read.
        reduce: ``mean`` or ``median``: the lower median over the views that cover the cell, exact,
            NaN where one of them is (as ``torch.median``); it takes no weights.
        upsample: ``nearest`` or ``bilinear`` (``F.interpolate`` with ``align_corners=False``).
        border: a pixel that a view does not cover is left out (``coverage``), counts as 0
            (``zeros``, as published), or reads the nearest edge token (``clamp``).
        stride: pixels per output cell, (sh, sw) or one for both; divides (H, W). 1 is pixel scale,
            ``patch`` is token scale.
        out: [B, C, H / sh, W / sw], written in place; any strides that step over what the smaller
            ones span, channels_last is the fast one. Not differentiable. (Under ``torch.compile``
            torch 2.10 and 2.13 refuse one that is channels_last.)

    Returns:
        [B, C, H / sh, W / sw] of the dtype of ``tokens``, with strides (H'W'C, 1, W'C, C)
        (channels_last), or ``out``. 0 where no view counts. Differentiable with respect to
        ``tokens`` and ``weights`` in reverse and forward mode; the second derivatives of a mean
        and of a median exist with respect to ``tokens``. The gradient of a median goes to the view
        that it is (to the first of them, by dx, if there are several).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, mode word or value.

    Example:
        >>> tokens = torch.tensor([0.0, 4.0]).reshape(1, 1, 2, 1)
        >>> ensemble(tokens, torch.zeros(1, 2), grid=(1, 2), patch=(1, 4))[0, 0, 0]
        tensor([0.0000, 0.0000, 0.5000, 1.5000, 2.5000, 3.5000, 4.0000, 4.0000])
    """
    modes: dict[str, Any] = {
        "reduce": reduce,
        "upsample": upsample,
        "border": border,
        "stride": stride,
    }
    op = torch.ops.srt.ensemble
    if torch.compiler.is_compiling():
        if out is None:
            return cast(torch.Tensor, op(tokens, offsets, grid, patch, weights, **modes))
        op.out(tokens, offsets, grid, patch, weights, **modes, out=out)
        return out
    try:
        if out is None:
            field: torch.Tensor = op(tokens, offsets, grid, patch, weights, **modes)
            return field
        op.out(tokens, offsets, grid, patch, weights, **modes, out=out)
        return out
    except RuntimeError as error:
        _explain(
            error,
            "ensemble",
            lambda: check_ensemble(tokens, offsets, grid, patch, weights, **modes, out=out),
        )


def ensemble_moments(
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    grid: Sequence[int],
    patch: Sequence[int],
    weights: torch.Tensor | None = None,
    *,
    upsample: str = "bilinear",
    border: str = "coverage",
    stride: int | Sequence[int] = 1,
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
        Differentiable, once, with respect to ``tokens`` and ``weights``.

    Raises:
        TypeError, ValueError: as :func:`ensemble`.

    Example:
        >>> tokens = torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1)  # two views of one token
        >>> mean, var = ensemble_moments(tokens, torch.zeros(2, 2), grid=(1, 1), patch=(1, 1))
        >>> mean.item(), var.item()
        (2.0, 1.0)
    """
    modes: dict[str, Any] = {"upsample": upsample, "border": border, "stride": stride}
    op = torch.ops.srt.ensemble_moments
    if torch.compiler.is_compiling():
        return cast(
            tuple[torch.Tensor, torch.Tensor], op(tokens, offsets, grid, patch, weights, **modes)
        )
    try:
        mean, var = op(tokens, offsets, grid, patch, weights, **modes)
        return mean, var
    except RuntimeError as error:
        name = "ensemble_moments"
        _explain(
            error,
            name,
            lambda: check_views(_PREFIX + name, tokens, offsets, grid, patch, weights, **modes),
        )


def accumulate(
    op: str,
    state: dict[str, torch.Tensor],
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    grid: Sequence[int],
    patch: Sequence[int],
    *weights: torch.Tensor | None,
    **modes: Any,
) -> None:
    """``torch.ops.srt.<op>`` with errors as the functions have them; for srt_ext.streaming."""
    call = getattr(torch.ops.srt, op)
    if torch.compiler.is_compiling():
        call(*state.values(), tokens, offsets, grid, patch, *weights, **modes)
        return
    try:
        call(*state.values(), tokens, offsets, grid, patch, *weights, **modes)
    except RuntimeError as error:

        def check() -> None:
            (weight,) = weights or (None,)
            where = _PREFIX + op
            shape = check_views(where, tokens, offsets, grid, patch, weight, **modes)
            check_state(where, state, shape, tokens)

        _explain(error, op, check)


def _channels_last(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """The strides that the schema promises, also where a size is 0 or 1."""
    _, channels, height, width = shape
    return height * width * channels, 1, width * channels, channels


@torch.library.register_fake("srt::shift")
def _(
    image: torch.Tensor,
    offsets: torch.Tensor,
    *,
    padding: str = "reflect",
    interpolation: str = "bilinear",
) -> torch.Tensor:
    return image.new_empty(check_shift(image, offsets, padding, interpolation))


@torch.library.register_fake("srt::ensemble")
def _(
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    grid: Sequence[int],
    patch: Sequence[int],
    weights: torch.Tensor | None = None,
    *,
    reduce: str = "mean",
    upsample: str = "bilinear",
    border: str = "coverage",
    stride: Sequence[int] = (1, 1),
) -> torch.Tensor:
    shape = check_ensemble(tokens, offsets, grid, patch, weights, reduce, upsample, border, stride)
    return tokens.new_empty_strided(shape, _channels_last(shape))


@torch.library.register_fake("srt::ensemble.out")
def _(
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    grid: Sequence[int],
    patch: Sequence[int],
    weights: torch.Tensor | None = None,
    *,
    reduce: str = "mean",
    upsample: str = "bilinear",
    border: str = "coverage",
    stride: Sequence[int] = (1, 1),
    out: torch.Tensor,
) -> None:
    check_ensemble(tokens, offsets, grid, patch, weights, reduce, upsample, border, stride, out)


@torch.library.register_fake("srt::ensemble_moments")
def _(
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    grid: Sequence[int],
    patch: Sequence[int],
    weights: torch.Tensor | None = None,
    *,
    upsample: str = "bilinear",
    border: str = "coverage",
    stride: Sequence[int] = (1, 1),
) -> tuple[torch.Tensor, torch.Tensor]:
    where = "srt::ensemble_moments"
    shape = check_views(where, tokens, offsets, grid, patch, weights, upsample, border, stride)
    strides = _channels_last(shape)
    return tokens.new_empty_strided(shape, strides), tokens.new_empty_strided(shape, strides)


@torch.library.register_fake("srt::_shift_backward")
def _(
    grad: torch.Tensor, offsets: torch.Tensor, *, padding: str, interpolation: str
) -> torch.Tensor:
    return grad.new_empty(grad.shape[1:])


@torch.library.register_fake("srt::_mean_backward")
def _(
    grad: torch.Tensor,
    offsets: torch.Tensor,
    grid: Sequence[int],
    patch: Sequence[int],
    weights: torch.Tensor | None,
    *,
    upsample: str,
    border: str,
    stride: Sequence[int],
) -> torch.Tensor:
    return grad.new_empty(offsets.shape[0], grad.shape[0], grid[0] * grid[1], grad.shape[1])


@torch.library.register_fake("srt::accumulate_mean_")
def _(
    mean: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    grid: Sequence[int],
    patch: Sequence[int],
    weights: torch.Tensor | None = None,
    *,
    upsample: str = "bilinear",
    border: str = "coverage",
    stride: Sequence[int] = (1, 1),
) -> None:
    where = "srt::accumulate_mean_"
    shape = check_views(where, tokens, offsets, grid, patch, weights, upsample, border, stride)
    check_state(where, {"mean": mean, "weight": weight}, shape, tokens)


@torch.library.register_fake("srt::accumulate_moments_")
def _(
    mean: torch.Tensor,
    var: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    grid: Sequence[int],
    patch: Sequence[int],
    weights: torch.Tensor | None = None,
    *,
    upsample: str = "bilinear",
    border: str = "coverage",
    stride: Sequence[int] = (1, 1),
) -> None:
    where = "srt::accumulate_moments_"
    shape = check_views(where, tokens, offsets, grid, patch, weights, upsample, border, stride)
    check_state(where, {"mean": mean, "var": var, "weight": weight}, shape, tokens)


@torch.library.register_fake("srt::accumulate_median_")
def _(
    window: torch.Tensor,
    count: torch.Tensor,
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    grid: Sequence[int],
    patch: Sequence[int],
    *,
    upsample: str = "bilinear",
    border: str = "coverage",
    stride: Sequence[int] = (1, 1),
) -> None:
    where = "srt::accumulate_median_"
    shape = check_views(where, tokens, offsets, grid, patch, None, upsample, border, stride)
    check_state(where, {"window": window, "count": count}, shape, tokens)
