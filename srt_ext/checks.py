"""The rules for the metadata of arguments.

The fake kernels and the Python functions use these; csrc/srt/validation.cpp repeats them, in the same
words, as invariants of the ops. Values (finite offsets, weights >= 0) are checked there alone. What
needs no tensors stands in _rules.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import _rules
from ._rules import (
    BORDERS,
    INTERPOLATIONS,
    MAX_PIXELS,
    PADDINGS,
    REDUCES,
    UPSAMPLES,
    WINDOW_PLANES,
    check_word,
)
from ._rules import wrong as _error

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _shape(tensor: torch.Tensor) -> list[int]:
    return list(tensor.shape)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(where: str, name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise _error(TypeError, where, f"{name} must be a torch.Tensor", type(value).__name__)


def _check_element_type(where: str, name: str, tensor: torch.Tensor, allow_uint8: bool) -> None:
    if tensor.dtype not in FLOATING and not (allow_uint8 and tensor.dtype == torch.uint8):
        rule = f"{name} must be float32, float16, bfloat16 or float64"
        raise _error(
            TypeError, where, rule + (", or uint8" if allow_uint8 else ""), _name(tensor.dtype)
        )


def _check_values(where: str, name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device.type != "cpu" and tensor.device != device:
        rule = f"{name} must be on the CPU or on the device of the input"
        raise _error(ValueError, where, rule, tensor.device)
    if tensor.dtype not in (torch.float32, torch.float64):
        raise _error(TypeError, where, f"{name} must be float32 or float64", _name(tensor.dtype))


def check_pair(where: str, name: str, value: object) -> tuple[int, int]:
    """(y, x); one integer stands for both."""
    return _rules.check_pair(where, name, value, (int, torch.SymInt))


def _symbolic(*sizes: int) -> bool:
    """Sizes that a compiler leaves open: a limit on them would become a guard of its program.

    The op itself checks the sizes that come.
    """
    return any(isinstance(size, torch.SymInt) for size in sizes)


def _check_bytes(where: str, shape: Sequence[int], like: torch.Tensor) -> None:
    if _symbolic(*shape):
        return
    total = like.element_size()
    for size in shape:
        total *= max(1, size)  # the strides of an empty tensor are products of its other sizes
    if total >= 2**63:
        raise _error(ValueError, where, "the output must have fewer than 2^63 bytes", list(shape))


def check_views(
    where: str,
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    grid: object,
    patch: object,
    weights: torch.Tensor | None,
    upsample: str,
    border: str,
    stride: object,
    least: int = 1,
) -> list[int]:
    """The shape [B, C, H', W'] of the field of ``least`` views or more.

    Raises ValueError or TypeError.
    """
    check_tensor(where, "tokens", tokens)
    check_tensor(where, "offsets", offsets)
    if weights is not None:
        check_tensor(where, "weights", weights)
    _check_element_type(where, "tokens", tokens, allow_uint8=False)
    if tokens.dim() != 4:
        rule = "tokens must have 4 dimensions, [V, B, N, C]"
        raise _error(ValueError, where, rule, _shape(tokens))
    views, batch, count, channels = tokens.shape
    if views < least:
        raise _error(ValueError, where, "tokens must hold at least one view", _shape(tokens))
    if offsets.dim() != 2 or offsets.shape[0] != views or offsets.shape[1] != 2:
        rule = f"offsets must be [V, 2] with V = {views}"
        raise _error(ValueError, where, rule, _shape(offsets))
    if weights is not None and (weights.dim() != 1 or weights.shape[0] != views):
        rule = f"weights must be [V] with V = {views}"
        raise _error(ValueError, where, rule, _shape(weights))
    grid, patch, stride = (
        check_pair(where, "grid", grid),
        check_pair(where, "patch", patch),
        check_pair(where, "stride", stride),
    )
    pixels = [g * p for g, p in zip(grid, patch, strict=True)]
    if max(pixels) > MAX_PIXELS:
        rule = "grid * patch must be at most 2^24 pixels on each axis"
        raise _error(ValueError, where, rule, f"{list(grid)} * {list(patch)}")
    if any(n % s for n, s in zip(pixels, stride, strict=True)):
        rule = f"stride must divide grid * patch = {pixels}"
        raise _error(ValueError, where, rule, list(stride))
    if grid[0] * grid[1] != count:
        rule = f"grid must hold the N = {count} tokens of a view, without class or register tokens"
        raise _error(ValueError, where, rule, list(grid))
    shape = [batch, channels, pixels[0] // stride[0], pixels[1] // stride[1]]
    _check_bytes(where, shape, tokens)
    if channels > 1 and tokens.stride(3) != 1:
        rule = "tokens must be dense in the last dimension"
        raise _error(ValueError, where, rule, f"stride {tokens.stride(3)}")
    check_word(where, "upsample", upsample, UPSAMPLES)
    check_word(where, "border", border, BORDERS)
    _check_values(where, "offsets", offsets, tokens.device)
    if weights is not None:
        _check_values(where, "weights", weights, tokens.device)
    return shape


def _check_written(
    where: str,
    name: str,
    tensor: torch.Tensor,
    shape: list[int],
    dtype: torch.dtype,
    dtype_rule: str,
    device: torch.device,
) -> None:
    check_tensor(where, name, tensor)
    if tensor.dtype != dtype:
        raise _error(TypeError, where, f"{name} must {dtype_rule}", _name(tensor.dtype))
    if tensor.device != device:
        raise _error(ValueError, where, f"{name} must be on the device of tokens", tensor.device)
    if _shape(tensor) != shape:
        raise _error(ValueError, where, f"{name} must be {shape}", _shape(tensor))


def check_ensemble(
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    grid: object,
    patch: object,
    weights: torch.Tensor | None,
    reduce: str,
    upsample: str,
    border: str,
    stride: object,
    out: torch.Tensor | None = None,
) -> list[int]:
    """The shape [B, C, H', W'] of the field. Raises ValueError or TypeError."""
    where = "srt::ensemble"
    check_word(where, "reduce", reduce, REDUCES)
    if reduce == "median" and weights is not None:
        raise _error(ValueError, where, "weights must be None where reduce is 'median'", "weights")
    shape = check_views(where, tokens, offsets, grid, patch, weights, upsample, border, stride)
    if out is not None:
        rule = f"have the dtype of tokens, {_name(tokens.dtype)}"
        _check_written(where, "out", out, shape, tokens.dtype, rule, tokens.device)
    return shape


def check_state(
    where: str, state: dict[str, torch.Tensor], shape: list[int], tokens: torch.Tensor
) -> None:
    """The state of a stream: mean, var or window, and weight or count."""
    double = tokens.dtype == torch.float64
    dtype = torch.float64 if double else torch.float32
    rule = "be float64, as tokens are" if double else "be float32"
    for name, tensor in state.items():
        if name in ("weight", "count"):
            _check_written(
                where, name, tensor, shape[2:], torch.float64, "be float64", tokens.device
            )
        else:
            planes = [WINDOW_PLANES, *shape] if name == "window" else shape
            _check_written(where, name, tensor, planes, dtype, rule, tokens.device)


def check_shift(
    image: torch.Tensor, offsets: torch.Tensor, padding: str, interpolation: str
) -> list[int]:
    """The shape [V, B, C, H, W] of the views. Raises ValueError or TypeError."""
    where = "srt::shift"
    check_tensor(where, "image", image)
    check_tensor(where, "offsets", offsets)
    _check_element_type(where, "image", image, allow_uint8=True)
    if image.dim() != 4:
        rule = "image must have 4 dimensions, [B, C, H, W]"
        raise _error(ValueError, where, rule, _shape(image))
    if not _symbolic(*image.shape[2:]) and max(image.shape[2:]) > MAX_PIXELS:
        rule = "image must have at most 2^24 pixels on each axis"
        raise _error(ValueError, where, rule, _shape(image))
    if offsets.dim() != 2 or offsets.shape[0] < 1 or offsets.shape[1] != 2:
        rule = "offsets must be [V, 2] with V >= 1"
        raise _error(ValueError, where, rule, _shape(offsets))
    check_word(where, "padding", padding, PADDINGS)
    check_word(where, "interpolation", interpolation, INTERPOLATIONS)
    _check_values(where, "offsets", offsets, image.device)
    shape = [offsets.shape[0], *_shape(image)]
    _check_bytes(where, shape, image)
    return shape
