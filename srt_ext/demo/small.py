"""The small ViT that comes with the package. MODEL_CARD.md describes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .scenes import CLASSES

FILE = Path(__file__).with_name("small.safetensors")
PATCH = 8  # pixels
MEAN = STD = (0.5, 0.5, 0.5)


def make_small() -> Any:
    """A VisionTransformer of timm with random weights: [B, 3, H, W] -> [B, N, 6 + 1].

    Of each token the logits of :data:`~srt_ext.demo.scenes.CLASSES`, and nearness in 1 / metres.
    The head is linear: it can be applied to the features of :class:`srt_ext.SRT`, too.
    """
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=96,
        patch_size=PATCH,
        embed_dim=128,
        depth=6,
        num_heads=4,
        num_classes=len(CLASSES) + 1,
        global_pool="",
        class_token=False,
        dynamic_img_size=True,
    )


def load_small() -> tuple[Any, dict[str, Any]]:
    """The trained model in eval mode, float32, and ``mean`` and ``std`` of its pictures."""
    from safetensors.torch import load_file

    model = make_small()
    model.load_state_dict(load_file(FILE))  # which brings fp16 to the parameters' float32
    return model.eval(), {"mean": MEAN, "std": STD}
