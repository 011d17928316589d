"""The small ViT in this package, described in MODEL_CARD.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .scenes import CLASSES

FILE = Path(__file__).with_name("small.safetensors")
PATCH = 8  # pixels
MEAN = STD = (0.5, 0.5, 0.5)


def make_small() -> Any:
    """A VisionTransformer of timm with random weights: [B, 3, H, W] -> [B, N, 6 + 1].

    The outputs of a token are the logits of ``srt_ext.demo.scenes.CLASSES`` and the nearness in
    1 / metres. The head is linear, so it can also be applied to features of :class:`srt_ext.SRT`.
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
    """The trained model, and the normalisation of its images.

    Returns:
        The model in eval mode, float32, and a dict with ``mean`` and ``std`` for pixels in 0 .. 1.

    Example:
        >>> model, config = load_small()
        >>> model.num_features, config["std"]
        (128, (0.5, 0.5, 0.5))
    """
    from safetensors.torch import load_file

    model = make_small()
    model.load_state_dict(load_file(FILE))  # converts fp16 to float32
    return model.eval(), {"mean": MEAN, "std": STD}
