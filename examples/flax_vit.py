"""Dense features of a Flax (NNX) ViT: views, model and ensemble in one ``jax.jit``.

Run ``python examples/flax_vit.py`` in a clone. The example needs jax, flax, safetensors and Pillow;
it does not need torch, and downloads nothing. It reads the weights of the small ViT in srt_ext.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file

import srt_ext.jax as srt

DEMO = Path(srt.__file__).with_name("demo")
PATCH = 8  # pixels per token along y and x
STRIDE = 2  # pixels per cell of the field

# [V, 2], (dy, dx) in pixels: srt_ext.views.best(9, radius=3), which needs torch, as numbers.
OFFSETS = np.array(
    [(-3, -2), (-2, 1), (-2, 3), (-1, -2), (0, 0), (1, 2), (2, -3), (2, -1), (3, 2)], np.float32
)


class Block(nnx.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.norm1 = nnx.LayerNorm(dim, epsilon=1e-6, rngs=rngs)
        self.qkv = nnx.Linear(dim, 3 * dim, rngs=rngs)
        self.proj = nnx.Linear(dim, dim, rngs=rngs)
        self.norm2 = nnx.LayerNorm(dim, epsilon=1e-6, rngs=rngs)
        self.fc1 = nnx.Linear(dim, 4 * dim, rngs=rngs)
        self.fc2 = nnx.Linear(4 * dim, dim, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, N, C] -> [B, N, C]
        qkv = self.qkv(self.norm1(x)).reshape(*x.shape[:2], 3, self.heads, -1)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        x = x + self.proj(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))
        return x + self.fc2(nnx.gelu(self.fc1(self.norm2(x)), approximate=False))


class ViT(nnx.Module):
    """A ViT without a class token. The position embedding is resized to the grid of the image."""

    def __init__(
        self, dim: int, depth: int, heads: int, grid: int, patch: int, rngs: nnx.Rngs
    ) -> None:
        size = (patch, patch)
        self.embed = nnx.Conv(3, dim, size, strides=size, padding="VALID", rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, grid, grid, dim)))
        self.blocks = nnx.List([Block(dim, heads, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(dim, epsilon=1e-6, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:  # [B, H, W, 3] -> [B, N, C]
        x = self.embed(images)  # [B, h, w, C]
        x = x + jax.image.resize(self.positions[...], (1, *x.shape[1:]), "cubic")
        x = x.reshape(len(x), -1, x.shape[-1])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


# The names in timm of the parts that have another name here.
TIMM = {
    "embed": "patch_embed.proj",
    "positions": "pos_embed",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "kernel": "weight",
    "scale": "weight",
}


def load(model: ViT, weights: Mapping[str, np.ndarray]) -> None:
    """Copies the weights of a timm VisionTransformer of the same architecture into ``model``."""
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = weights[".".join(TIMM.get(part, str(part)) for part in path)]
        if path[-1] == "kernel":  # torch: [out, in] or [out, in, Ph, Pw]; Flax: [..., in, out]
            value = np.moveaxis(value, (0, 1), (-1, -2))
        parameter[...] = jnp.asarray(value, jnp.float32).reshape(parameter.shape)


@jax.jit
def dense_features(model: ViT, image: jax.Array) -> jax.Array:
    """image [B, 3, H, W] -> field [B, C, H / STRIDE, W / STRIDE]."""
    views = srt.shift(image, OFFSETS)  # [V, B, 3, H, W]
    batch = views.reshape(-1, *image.shape[1:])  # [V * B, 3, H, W]
    tokens = model(batch.transpose(0, 2, 3, 1))  # NHWC for Flax; [V * B, N, C]
    tokens = tokens.reshape(len(OFFSETS), len(image), *tokens.shape[1:])  # [V, B, N, C]
    grid = image.shape[2] // PATCH, image.shape[3] // PATCH
    return srt.ensemble(tokens, OFFSETS, grid, (PATCH, PATCH), stride=STRIDE)


def small_vit() -> ViT:
    """The small ViT in srt_ext (srt_ext/demo/MODEL_CARD.md)."""
    model = ViT(dim=128, depth=6, heads=4, grid=12, patch=PATCH, rngs=nnx.Rngs(0))
    load(model, load_file(DEMO / "small.safetensors"))
    return model


def read_image(path: Path, size: tuple[int, int]) -> jax.Array:
    """[1, 3, H, W] in -1 .. 1, for a size (W, H)."""
    pixels = np.asarray(Image.open(path).convert("RGB").resize(size), np.float32)
    return jnp.asarray(pixels / 127.5 - 1).transpose(2, 0, 1)[None]


if __name__ == "__main__":
    image = read_image(DEMO / "astronaut.jpg", (224, 160))
    field = dense_features(small_vit(), image)
    print(f"image {image.shape} -> field {field.shape}, {field.dtype}")
