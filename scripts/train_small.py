"""Trains the small ViT that is bundled with the package (srt_ext/demo), on generated scenes only.

Run it in a clone after `pip install -e ".[models]"`. It takes less than an hour on two cores and
writes srt_ext/demo/small.safetensors.
"""

from __future__ import annotations

import math
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
import typer
from rich.progress import track

from srt_ext.cli.folder import save
from srt_ext.demo.scenes import CLASSES, Scene, scene
from srt_ext.demo.small import FILE, PATCH, make_small

SIDE = 128  # pixels of a scene
CUT = 108  # pixels of the smallest crop
CELLS = (9, 10, 12, 14)  # tokens along a side of the images of a batch
HELD_OUT = 1_000_000  # first seed that is not used for training
NEARNESS = 4.0  # weight of the nearness loss relative to the class loss


def one(seed: int) -> Scene:
    return scene(seed, SIDE, SIDE)


def make_scenes(first: int, count: int, processes: int) -> tuple[torch.Tensor, ...]:
    """Generates pixels [S, 3, 128, 128] and labels [S, 128, 128], both uint8, and nearness.

    Nearness is [S, 128, 128], float16.
    """
    pixels = torch.empty(count, 3, SIDE, SIDE, dtype=torch.uint8)
    labels = torch.empty(count, SIDE, SIDE, dtype=torch.uint8)
    nearness = torch.empty(count, SIDE, SIDE, dtype=torch.float16)
    with ProcessPoolExecutor(processes) as pool:
        found = pool.map(one, range(first, first + count), chunksize=16)
        for i, made in enumerate(track(found, "scenes", count)):
            pixels[i] = torch.from_numpy(made.pixels).permute(2, 0, 1)
            labels[i] = torch.from_numpy(made.labels)
            nearness[i] = torch.from_numpy(made.nearness)
    return pixels, labels, nearness


def prepare(model: Any) -> None:
    """Initialises the weights so that training converges faster than from random weights.

    The patch embedding computes cosine transforms of brightness and two colours, low frequencies
    first. The position embeddings are sine and cosine waves along both axes. Keys equal queries, so
    that a token initially attends to similar and near tokens (after Trockman and Kolter, "Mimetic
    initialization of self-attention layers", 2023). All of them are in random bases.
    """

    def basis(columns: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(model.embed_dim, columns))[0]

    def waves(count: int, at: torch.Tensor, period: float) -> torch.Tensor:
        angles = at[:, None] * math.pi / period * torch.arange(1, count + 1)
        return torch.cat([angles.sin(), angles.cos()], 1)

    n = torch.arange(PATCH)
    lines = torch.cos(math.pi / PATCH * (n[None] + 0.5) * n[:, None]) / math.sqrt(PATCH / 2)
    lines[0] /= math.sqrt(2)
    slow = sorted((a * a + b * b, a, b) for a in range(PATCH) for b in range(PATCH))
    colours = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]])
    colours /= colours.norm(dim=1, keepdim=True)
    filters = [
        (0.25 if a == b == 0 else 1.0)  # the mean of a patch is by far the largest
        * torch.einsum("c,y,x->cyx", colour, lines[a], lines[b])
        for colour, count in zip(colours, (64, 32, 32), strict=True)
        for _, a, b in slow[:count]
    ]
    side = model.patch_embed.grid_size[0]
    line = waves(8, torch.arange(side), 2 * side)
    across = torch.cat([line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)], 2)
    heads = model.blocks[0].attn.num_heads
    size = model.embed_dim // heads
    with torch.no_grad():
        proj = model.patch_embed.proj
        proj.weight.copy_(
            torch.einsum("ij,jcyx->icyx", basis(model.embed_dim), torch.stack(filters))
        )
        proj.bias.zero_()
        model.pos_embed.copy_((1.5 * across.flatten(0, 1) @ basis(across.shape[2]).T)[None])
        for block in model.blocks:
            same = 0.8 * torch.cat([basis(size).T for _ in range(heads)])
            block.attn.qkv.weight[: 2 * model.embed_dim] = torch.cat([same, same])


def batch(
    data: tuple[torch.Tensor, ...], size: int, random: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Samples augmented crops: images [B, 3, s, s], class shares [B, N, 6], nearness [B, N].

    The targets of a token are the shares of the classes in its patch and the mean nearness there.
    """
    cells, side = int(random.choice(CELLS)), int(random.integers(CUT, SIDE + 1))
    index = torch.from_numpy(random.integers(len(data[0]), size=size))
    y, x = random.integers(SIDE - side + 1, size=2)
    cut = [part[index, ..., y : y + side, x : x + side] for part in data]
    if random.random() < 0.5:
        cut = [part.flip(-1) for part in cut]
    shape = (cells * PATCH, cells * PATCH)
    images = F.interpolate(cut[0].float() / 255, shape, mode="bilinear", antialias=True)

    def drawn(low: float, high: float, channels: int) -> torch.Tensor:
        values = random.uniform(low, high, (size, channels, 1, 1))
        return torch.from_numpy(values.astype(np.float32))

    images = images * drawn(0.7, 1.3, 1) * drawn(0.85, 1.15, 3) + drawn(-0.15, 0.15, 1)
    grey = images.clamp_(0, 1).mean(1, keepdim=True)
    images = grey + (images - grey) * drawn(0, 1.4, 1)
    shares = F.one_hot(cut[1].long(), len(CLASSES)).permute(0, 3, 1, 2).float()
    truth = torch.cat([shares, cut[2][:, None].float()], 1)
    targets = F.interpolate(truth, (cells, cells), mode="area").flatten(2).transpose(1, 2)
    return (images - 0.5) / 0.5, targets[..., :-1], targets[..., -1]


@torch.inference_mode()
def measured(model: Any, data: tuple[torch.Tensor, ...]) -> str:
    """Evaluates the plain tokens of 112 x 112 pixel images, upsampled bilinearly."""
    counts, squares = torch.zeros(len(CLASSES), len(CLASSES)), 0.0
    grid = CELLS[-1]
    for pixels, labels, nearness in zip(*(part.split(64) for part in data), strict=True):
        shape = (grid * PATCH, grid * PATCH)
        images = F.interpolate(pixels.float() / 255, shape, mode="bilinear", antialias=True)
        answer = model((images - 0.5) / 0.5).transpose(1, 2)
        maps = F.interpolate(answer.unflatten(2, (grid, grid)), (SIDE, SIDE), mode="bilinear")
        pairs = labels.long() * len(CLASSES) + maps[:, :-1].argmax(1)
        counts += pairs.flatten().bincount(minlength=len(CLASSES) ** 2).view_as(counts)
        squares += float((maps[:, -1] - nearness.float()).square().mean()) * len(pixels)
    iou = counts.diag() / (counts.sum(0) + counts.sum(1) - counts.diag())
    each = " ".join(f"{i:.2f}" for i in iou)
    return f"mIoU {iou.mean():.4f} ({each}), RMSE {(squares / len(data[0])) ** 0.5:.4f}"


def main(
    scenes: Annotated[int, typer.Option(help="Scenes to train on.")] = 12_000,
    steps: Annotated[int, typer.Option(min=101, help="Number of batches.")] = 2500,
    size: Annotated[int, typer.Option(help="Images per batch.")] = 64,
    rate: Annotated[float, typer.Option(help="The highest learning rate.")] = 1e-3,
    processes: Annotated[int, typer.Option(help="Processes that generate scenes.")] = 2,
    output: Path = FILE,
) -> None:
    """Trains with AdamW on soft classes and nearness; saves an exponential mean of the weights."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    data = make_scenes(0, scenes, processes)
    held_out = make_scenes(HELD_OUT, 256, processes)
    model = make_small()
    prepare(model)
    mean = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    optimizer = torch.optim.AdamW(model.parameters(), rate, (0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=100 / steps)
    start, lately = time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        images, classes, nearness = batch(data, size, random)
        answer = model(images)
        loss = F.cross_entropy(answer[..., :-1].flatten(0, 1), classes.flatten(0, 1))
        loss = loss + NEARNESS * F.l1_loss(answer[..., -1], nearness)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean.update_parameters(model)
        lately += loss.item() / 50
        if step % 50 == 0:
            seconds = time.perf_counter() - start
            print(f"{step}: mean loss {lately:.4f}, {seconds:.0f} s", flush=True)
            lately = 0.0
        if step % 500 == 0 or step == steps:
            print(measured(mean.eval(), held_out), flush=True)
    state = {name: value.half().contiguous() for name, value in mean.module.state_dict().items()}
    facts = {"scenes": str(scenes), "steps": str(steps), "batch": str(size)}
    save(state, output, facts)


if __name__ == "__main__":
    typer.run(main)
