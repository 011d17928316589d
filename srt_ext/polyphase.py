"""The polyphase anchor of an image: a pixel that moves with the content, to align views."""

from __future__ import annotations

import torch

from ._validation import check_pair, check_tensor, wrong


def polyphase(
    image: torch.Tensor, patch: int | tuple[int, int], full: bool = False
) -> torch.Tensor:
    """Finds the polyphase anchor of each image, a pixel that moves with the content.

    An image has Ph * Pw phases ``image[:, :, py::Ph, px::Pw]``. The anchor is the phase (py, px)
    with the largest energy, the sum of squares over its channels and pixels; if several are equal,
    the first in row order. Therefore ``roll(image, (-py, -px))`` has the same patches for every
    roll of the image, up to their order. With ``full``, the anchor also includes the position of
    the largest energy within the phase, and the rolled image itself is the same.

    Ties break this property: if several pixels have the same largest energy (such as saturated
    pixels), the first in row order is used, and a roll changes which one is first.
    :class:`srt_ext.SRT` resolves ties by the rest of the image.

    Args:
        image: [B, C, H, W], floating-point or uint8, on any device; H and W are multiples of the
            patch. Sums are computed in float64.
        patch: (Ph, Pw) in pixels, or one for both.
        full: whether to add the position within the phase.

    Returns:
        [B, 2], int64, (py, px) in pixels, on the device of ``image``: a position within a patch,
        or with ``full`` within the image. The call does not synchronise and has no gradient.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has a wrong shape.

    References:
        Ding et al., "Reviving Shift Equivariance in Vision Transformers", 2023, after Chaman and
        Dokmanic, "Truly shift-invariant convolutional neural networks", 2021.

    Example:
        >>> image = torch.zeros(1, 1, 4, 6)
        >>> image[..., 3, 4] = 1
        >>> polyphase(image, 2), polyphase(image, 2, full=True)
        (tensor([[1, 0]]), tensor([[3, 4]]))
    """
    patch = check_pair("srt_ext.polyphase", "patch", patch)
    _check_image(image, patch)
    if not isinstance(full, bool):
        raise wrong(TypeError, "srt_ext.polyphase", "full must be True or False", repr(full))
    energy = _energy(image, patch)
    phase = energy.sum((1, 3)).flatten(1).argmax(1, keepdim=True)  # [B, 1], the first if equal
    offset = torch.cat([phase // patch[1], phase % patch[1]], 1)
    if not full:
        return offset
    places = energy.permute(0, 2, 4, 1, 3).flatten(3).flatten(1, 2)  # [B, Ph * Pw, h * w]
    place = places.take_along_dim(phase[..., None], 1)[:, 0].argmax(1, keepdim=True)  # [B, 1]
    width = energy.shape[3]
    return offset + torch.cat([place // width * patch[0], place % width * patch[1]], 1)


def unique_anchor(image: torch.Tensor, patch: tuple[int, int]) -> torch.Tensor:
    """As :func:`polyphase` with ``full``, but resolves ties of the energy by the rest of the image.

    In 14 of 54 8-bit photographs several saturated pixels share the largest energy. Here they are
    ranked by the energies of all rows and columns, weighted by the distance from the pixel.
    """
    energy = _energy(image, patch)
    phases = energy.sum((1, 3), keepdim=True)
    # A roll changes the rounding of the sums.
    ties = phases >= phases.amax((2, 4), keepdim=True) * (1 - 2**-40)
    energy, ties = (x.flatten(3).flatten(1, 2) for x in (energy, ties.expand_as(energy)))
    largest = energy.where(ties, -1)  # [B, H, W]
    largest = largest == largest.amax((1, 2), keepdim=True)
    seen = _seen(energy.sum(2))[:, :, None] + _seen(energy.sum(1))[:, None]
    pixel = seen.where(largest, -1).flatten(1).argmax(1, keepdim=True)
    width = energy.shape[2]
    return torch.cat([pixel // width, pixel % width], 1)


def _seen(line: torch.Tensor) -> torch.Tensor:
    """line [B, n]: at each position, the sum of all elements, weighted by relative position."""
    step = 1
    while step < line.shape[1]:
        line = line + line.roll(-step, 1) / (1 + step)
        step *= 2
    return line


def _energy(image: torch.Tensor, patch: tuple[int, int]) -> torch.Tensor:
    """[B, h, Ph, w, Pw], float64: the sum of squares over the channels of each pixel."""
    energy = image.detach().double().square().sum(1)
    sizes = energy.shape[1] // patch[0], patch[0], energy.shape[2] // patch[1], patch[1]
    return energy.reshape(-1, *sizes)


def _check_image(image: torch.Tensor, patch: tuple[int, int]) -> None:
    check_tensor("srt_ext.polyphase", "image", image)
    if not image.is_floating_point() and image.dtype != torch.uint8:
        rule = "image must be floating-point or uint8"
        raise wrong(TypeError, "srt_ext.polyphase", rule, image.dtype)
    if image.dim() != 4:
        rule = "image must have 4 dimensions, [B, C, H, W]"
        raise wrong(ValueError, "srt_ext.polyphase", rule, list(image.shape))
    height, width = image.shape[2:]
    if height % patch[0] or width % patch[1] or not height or not width:
        rule = f"H and W of image must be multiples of patch = {list(patch)}, and > 0"
        raise wrong(ValueError, "srt_ext.polyphase", rule, [height, width])
