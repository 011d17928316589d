"""The model's own head, with the ensemble of the views instead of the tokens of a layer.

``SRT(model, inject=layer)``: the blocks up to the layer run for every view, the other blocks and
the head once. Compared with the plain head: agreement of the predicted classes, confidence and, for
labelled images, accuracy. Images are resized, cropped and normalised according to the model's
configuration.

Labelled images have an ImageNet layout, ``val/CLASS/*.JPEG``, where CLASS is a WordNet id
(n02123045) or the index of a class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from timm.data.config import resolve_model_data_config
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from timm.data.transforms_factory import create_transform

import srt_ext
from research.quality.data import chosen, davis_frames, davis_sequences
from research.quality.fields import BATCH, Network
from research.quality.settings import IDENTITY, Setting

SUFFIXES = (".jpeg", ".jpg", ".png")
PICTURES_AT_ONCE = 4


@dataclass(frozen=True)
class Protocol:
    size: int  # pixels of the crop that the model sees
    pictures: int  # per source, evenly spread; 0: all

    def words(self) -> str:
        return f"{self.size} pixels high, crop of the model, {self.pictures or 'all'} pictures"


def protocol_of(network: Network, pictures: int) -> Protocol:
    return Protocol(resolve_model_data_config(network.model)["input_size"][1], pictures)


def settings(network: Network) -> list[Setting]:
    """Views injected at four layers, from the first to the last. ``plain``: the unshifted image."""
    layers = np.linspace(0, len(network.model.blocks) - 1, 4).round().astype(int)
    found = []
    for layer in dict.fromkeys(layers.tolist()):
        for family, views, border in (
            ("plain", IDENTITY, "coverage"),
            ("ours", "best:4:6", "coverage"),
            ("ours", "best:16:6", "coverage"),
            ("ours", "best:16:3", "coverage"),
            ("published", "paper:3", "zeros"),
        ):
            found.append(
                Setting(family, views, layer, network.patch, upsample="nearest", border=border)
            )
    return found


# ---- images -------------------------------------------------------------------------------------


def photographs() -> list[np.ndarray]:
    """Photographs of scikit-image, [H, W, 3] or [H, W] uint8."""
    from skimage import data

    names = ("astronaut", "camera", "cat", "coffee", "rocket")
    return [*(getattr(data, name)() for name in names), data.stereo_motorcycle()[0]]


def sources(folder: Path, limit: int) -> dict[str, list[Any]]:
    """Unlabelled images, paths or arrays, ``limit`` per source (0: all)."""
    found: dict[str, list[Any]] = {}
    if (folder / "davis").is_dir():
        frames = [
            davis_frames(folder / "davis", name, 0)[0][0]
            for name in davis_sequences(folder / "davis")
        ]
        found["DAVIS"] = chosen(frames, limit)
    if (folder / "camvid").is_dir():
        found["CamVid"] = chosen(images(folder / "camvid/test"), limit)
    return found | {"scikit-image": photographs()}


def images(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]


def labelled(folder: Path, network: Network, limit: int) -> tuple[list[Path], np.ndarray]:
    """``limit`` images of folder/val/CLASS (0: all), evenly spread, and their classes [P]."""
    classes = indices(network)
    paths = [path for part in (folder / "val").iterdir() if part.is_dir() for path in images(part)]
    names = {path.parent.name for path in paths}
    if unknown := sorted(name for name in names if name not in classes):
        raise ValueError(
            "classification: folders must be named by a class of the model, such as n02123045 or "
            f"{min(281, len(classes) - 1)}; got {', '.join(unknown[:3])}"
        )
    paths = chosen(paths, limit)
    return paths, np.array([classes[path.parent.name] for path in paths], dtype=np.int64)


def indices(network: Network) -> dict[str, int]:
    """Class indices of the head, by index and, for an ImageNet head, by WordNet id."""
    count = network.model.num_classes
    found = {str(i): i for i in range(count)}
    subset = infer_imagenet_subset(network.model)
    names = ImageNetInfo(subset).label_names() if subset else []
    return found | {name: i for i, name in enumerate(names)}


# ---- scores -------------------------------------------------------------------------------------


def injected(network: Network, setting: Setting) -> srt_ext.SRT:
    how: dict[str, Any] = {
        "reduce": setting.reduce,
        "upsample": setting.upsample,
        "border": setting.border,
    }
    return srt_ext.SRT(network.model, setting.views, inject=setting.layer, view_batch=BATCH, **how)


@torch.inference_mode()
def likelihoods(
    network: Network,
    settings: list[Setting],
    pictures: list[Any],
    progress: Callable[[], None],
) -> list[np.ndarray]:
    """Softmax of the plain head, then of each setting: [P, K] float32 for P images."""
    from PIL import Image

    transform = create_transform(**resolve_model_data_config(network.model), is_training=False)
    heads = [network.model, *(injected(network, setting) for setting in settings)]
    found: list[list[np.ndarray]] = [[] for _ in heads]
    for start in range(0, len(pictures), PICTURES_AT_ONCE):
        part = pictures[start : start + PICTURES_AT_ONCE]
        opened = [Image.fromarray(p) if isinstance(p, np.ndarray) else Image.open(p) for p in part]
        shown = torch.stack([transform(p.convert("RGB")) for p in opened]).to(network.device)
        for into, head in zip(found, heads, strict=True):
            into.append(head(shown).softmax(1).cpu().numpy())
        for _ in part:
            progress()
    return [np.concatenate(parts) for parts in found]


def scores(shares: np.ndarray, plain: np.ndarray, truth: np.ndarray | None) -> dict[str, float]:
    """``agreement`` with the plain head, ``confidence`` (mean probability of the predicted class).

    With ``truth`` also ``top1`` and ``top5``.

    Args:
        shares: [P, K], class probabilities.
        plain: [P, K], class probabilities of the plain head.
        truth: [P] int64, classes.
    """
    first = shares.argmax(1)
    found = {
        "agreement": float(accuracy_score(plain.argmax(1), first)),
        "confidence": float(shares.max(1).mean()),
    }
    if truth is not None:
        found["top1"] = float(accuracy_score(truth, first))
        every = range(shares.shape[1])
        found["top5"] = float(top_k_accuracy_score(truth, shares, k=5, labels=every))
    return found


def run(
    network: Network,
    settings: list[Setting],
    pictures: list[Any],
    truth: np.ndarray | None,
    progress: Callable[[], None],
) -> list[dict[str, float]]:
    """:func:`scores` of each setting; ``truth`` [P]: the classes of the images, if known."""
    plain, *others = likelihoods(network, settings, pictures, progress)
    return [scores(shares, plain, truth) for shares in others]
