"""``srt_ext.shift`` and ``srt_ext.ensemble``: ``torch.ops.srt.*`` with types, docs and errors.

Method: Lao et al., "Sub-token ViT Embedding via Stochastic Resonance Transformers", ICML 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, cast

import torch

from ._library import cuda_unavailable
from .checks import check_ensemble, check_shift

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
    if f"{_PREFIX}{op}: " in message:
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
        [V, B, C, H, W], dense, of the dtype of ``image``.

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
        reduce: ``mean``.
        upsample: ``nearest`` or ``bilinear`` (``F.interpolate`` with ``align_corners=False``).
        border: a pixel that a view does not cover is left out (``coverage``), counts as 0
            (``zeros``, as published), or reads the nearest edge token (``clamp``).
        stride: pixels per output cell, (sh, sw) or one for both; divides (H, W). 1 is pixel scale,
            ``patch`` is token scale.
        out: [B, C, H / sh, W / sw], written in place; any strides that step over what the smaller
            ones span, channels_last is the fast one. Not differentiable.

    Returns:
        [B, C, H / sh, W / sw] of the dtype of ``tokens``, with strides (H'W'C, 1, W'C, C)
        (channels_last), or ``out``. 0 where no view counts.

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


# Without a kernel at the Autograd key torch would only warn, and forward-mode AD would lose the
# tangent in silence. Until the ops have derivatives, asking for one is an error.
class _NoDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: Any, modes: dict[str, Any], *args: Any) -> Any:
        ctx.name = op.name()
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args, **modes)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> NoReturn:
        raise RuntimeError(f"{ctx.name} has no derivative in this version")


_autograd = torch.library.Library("srt", "IMPL")


def _register_autograd(op: Any) -> None:
    _autograd.impl(
        op.name().removeprefix(_PREFIX),
        lambda *args, **modes: _NoDerivative.apply(op, modes, *args),
        "Autograd",
    )


_register_autograd(torch.ops.srt.shift.default)
_register_autograd(torch.ops.srt.ensemble.default)


# ensemble.out, as torch's own out= functions behave: no derivative, a new version of `out` (so that
# a backward that saved the old content fails), no lazy negation of the memory that is written.
_OUT = torch.ops.srt.ensemble.out


def _out_autograd(*args: Any, out: torch.Tensor, **modes: Any) -> None:
    tensors = [a for a in (*args, out) if isinstance(a, torch.Tensor)]
    if any(torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in tensors) or (
        torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    ):
        raise RuntimeError(
            "srt::ensemble: out= is not differentiable; got an argument that requires grad"
        )
    with torch._C._AutoDispatchBelowAutograd():
        _OUT(*args, **modes, out=out)


def _out_version(keys: Any, *args: Any, out: torch.Tensor, **modes: Any) -> None:
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError("srt::ensemble: out must be no inference tensor outside inference mode")
    torch.autograd.graph.increment_version(out)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        _OUT.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args, **modes, out=out)


def _out_negative(*args: Any, out: torch.Tensor, **modes: Any) -> None:
    if out.is_neg() or out.is_conj():
        raise RuntimeError(
            "srt::ensemble: out must be no lazily negated or conjugated view; got one"
        )
    plain = [a.resolve_neg().resolve_conj() if isinstance(a, torch.Tensor) else a for a in args]
    _OUT(*plain, **modes, out=out)


_autograd.impl("ensemble.out", _out_autograd, "Autograd")
_autograd.impl("ensemble.out", _out_version, "ADInplaceOrView", with_keyset=True)
_autograd.impl("ensemble.out", _out_negative, "Negative")
_autograd.impl("ensemble.out", _out_negative, "Conjugate")
