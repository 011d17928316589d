"""Propagates the labels of the first frame of a video by feature similarity.

The protocol of DINO (Caron et al., ICCV 2021, after Jabri et al., NeurIPS 2020): a cell takes the
labels of its k nearest neighbours in feature space among the cells near it in the first and in the
last few frames, weighted by exp(cosine / temperature). One difference: the labels of the first
frame are the shares of a cell that each object covers, not the label at its centre, so that coarse
grids do not start from ragged labels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from research.quality.data import davis_frames, labels_of, opened
from research.quality.fields import Fields, Network, enlarged, unit
from research.quality.metrics import boundary, region
from research.quality.settings import Setting

TILE = 12  # side, in cells, of a tile whose neighbours are searched at once


@dataclass(frozen=True)
class Protocol:
    height: int  # pixels, of the frames that the model sees
    frames: int  # scored per sequence; 0: all
    last: int = 7  # source frames before the present one, in addition to the first
    k: int = 5
    radius: float = 0.2  # share of the height; in DINO 12 cells of 8 pixels, of 480
    temperature: float = 0.1

    def words(self) -> str:
        return (
            f"{self.height or 'full'} pixels high, {self.frames or 'all'} frames scored, labels "
            f"from the first and the last {self.last}, k {self.k}, radius {self.radius} of the "
            f"height, temperature {self.temperature}"
        )


def propagate(
    target: torch.Tensor,
    sources: list[torch.Tensor],
    labels: list[torch.Tensor],
    reach: int,
    k: int,
    temperature: float,
) -> torch.Tensor:
    """The labels of a frame, from the labels of other frames.

    Args:
        target: [C, h, w], normalised to length 1.
        sources: [C, h, w] for each other frame, normalised to length 1.
        labels: [K, h, w] for each other frame.
        reach: largest distance of a neighbour in y and in x, in cells.
        k: number of neighbours.
        temperature: of the softmax over the cosines of the neighbours.

    Returns:
        [K, h, w].
    """
    _, h, w = target.shape
    found = torch.empty_like(labels[0])
    stack, known = torch.stack(sources, 1), torch.stack(labels, 1)  # [C, S, h, w], [K, S, h, w]
    for y in range(0, h, TILE):
        for x in range(0, w, TILE):
            here = (slice(y, y + TILE), slice(x, x + TILE))
            rows = torch.arange(max(0, y - reach), min(h, y + TILE + reach))
            columns = torch.arange(max(0, x - reach), min(w, x + TILE + reach))
            near = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
            queries = target[:, here[0], here[1]]
            likeness = queries.flatten(1).T @ stack[:, :, near[0], near[1]].flatten(1)
            height, width = queries.shape[1:]
            too_far = [
                (torch.arange(start, start + n)[:, None] - at).abs() > reach
                for at, start, n in ((rows, y, height), (columns, x, width))
            ]  # [height, rows], [width, columns]
            far = too_far[0][:, None, :, None] | too_far[1][None, :, None, :]
            likeness = likeness.unflatten(1, (len(sources), -1))
            likeness.masked_fill_(far.to(target.device).reshape(height * width, 1, -1), -2)
            values, index = likeness.flatten(1).topk(min(k, int((~far[0, 0]).sum())), dim=1)
            shares = (values / temperature).softmax(1)
            chosen = known[:, :, near[0], near[1]].flatten(1)[:, index]  # [K, T, k]
            found[:, here[0], here[1]] = (chosen * shares).sum(2).unflatten(1, (height, width))
    return found


def one_hot(labels: np.ndarray, objects: list[int], shape: torch.Size) -> torch.Tensor:
    """labels [H, W] -> the share of each cell [1 + objects, h, w] by label, background first."""
    masks = torch.stack([torch.from_numpy(labels == value) for value in objects]).float()
    masks = torch.cat([1 - masks.sum(0, keepdim=True), masks])
    return F.interpolate(masks[None], size=shape, mode="area")[0]


def decided(soft: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """Soft labels [K, h, w] -> [H, W]; as in DINO, each map is first scaled to 0..1."""
    soft = enlarged(soft, size)
    least, most = soft.amin((1, 2), keepdim=True), soft.amax((1, 2), keepdim=True)
    winner: np.ndarray = ((soft - least) / (most - least).clamp(min=1e-9)).argmax(0).cpu().numpy()
    return winner


class Track:
    """The state of one setting in a sequence."""

    def __init__(self, field: torch.Tensor, labels: torch.Tensor, last: int) -> None:
        self.first = (unit(field), labels.to(field.device))
        self.recent: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=last)
        self.regions: list[float] = []
        self.boundaries: list[float] = []

    def step(self, field: torch.Tensor, protocol: Protocol) -> torch.Tensor:
        target, shown = unit(field), [self.first, *self.recent]
        reach = max(1, round(protocol.radius * target.shape[1]))
        features, labels = zip(*shown, strict=True)
        found = propagate(
            target, list(features), list(labels), reach, protocol.k, protocol.temperature
        )
        self.recent.append((target, found))
        return found


def run(
    network: Network,
    settings: list[Setting],
    folder: Path,
    sequence: str,
    protocol: Protocol,
    progress: Callable[[], None],
) -> list[dict[str, float]]:
    """J and F of each setting: means over the frames and objects of a sequence.

    The family ``labels`` uses the true labels instead of propagated ones; apart from chance this is
    the best score on its grid.
    """
    fields = Fields(network, settings)
    tracks: list[Track] = []
    objects: list[int] = []
    for frame, annotation in davis_frames(folder, sequence, protocol.frames):
        found = fields.of(opened(frame, protocol.height, network.patch))
        truth = labels_of(annotation)
        if not tracks:
            objects = [int(value) for value in np.unique(truth) if value]
            for field in found:
                labels = one_hot(truth, objects, field.shape[1:])
                tracks.append(Track(field, labels, protocol.last))
            progress()
            continue
        for setting, track, field in zip(settings, tracks, found, strict=True):
            with torch.inference_mode():
                if setting.family == "labels":
                    soft = one_hot(truth, objects, field.shape[1:])
                else:
                    soft = track.step(field, protocol)
                labels = decided(soft, (truth.shape[0], truth.shape[1]))
            for i, value in enumerate(objects):
                masks = (labels == i + 1, truth == value)
                track.regions.append(region(*masks))
                track.boundaries.append(boundary(*masks))
        progress()
    return [{"J": float(np.mean(t.regions)), "F": float(np.mean(t.boundaries))} for t in tracks]
