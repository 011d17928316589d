"""The cost of a setting: seconds, and operations of the model."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

import srt_ext
from research.quality.fields import BATCH, Fields, Network
from research.quality.settings import Setting


def seconds(network: Network, setting: Setting, pixels: np.ndarray, check: bool = True) -> float:
    """Seconds for one image, on one core or on a GPU.

    Uses :class:`srt_ext.SRT` if it supports the setting; ``check`` then compares its field with
    :class:`Fields`.
    """
    image, fields = network.image(pixels), Fields(network, [setting])
    ours = not setting.second and setting.tokens == "model"
    views = setting.design
    how: Any = {
        "scale": setting.scale,
        "layers": setting.layer,
        "reduce": setting.reduce,
        "stride": setting.stride,
        "upsample": setting.upsample,
        "border": setting.border,
        "view_batch": BATCH,
    }
    views = views._replace(offsets=views.offsets / setting.scale)
    srt = srt_ext.SRT(network.model, views, **how)
    clock = time.perf_counter if image.is_cuda else time.process_time
    start = clock()
    field = srt(image).field[0] if ours else fields.of(pixels)[0]
    if field.is_cuda:
        torch.cuda.synchronize()
    taken = clock() - start
    if check and ours:
        torch.testing.assert_close(field, fields.of(pixels)[0], rtol=1e-3, atol=1e-3)
    return taken


def operations(network: Network, setting: Setting, height: int, width: int) -> int:
    """Floating-point operations of the model's forward passes for an image of that size.

    Counted up to the last layer of the network, without shifts, enlarging and aggregation.
    """
    shots = Fields(network, [setting]).shots.values()
    return sum(of.srt.cost((height, width)).operations for of in shots)
