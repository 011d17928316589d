"""``srt-ext spot``: draws sub-pixel windows on an image."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import typer

from ..images import open_image, to_pixels
from . import common

if TYPE_CHECKING:
    import torch

    from ..extraction import Network
    from ..spot import Search, Subpixel


Placement = Literal["isotropic", "uniform", "gauss", "sobol", "center", "edge", "salient", "grid"]


@common.user_errors()
def command(
    photo: Annotated[Path, typer.Argument(metavar="PHOTO", help="An image file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Figure to write.")] = Path(
        "spot.png"
    ),
    model: common.ModelName = None,
    weights: common.Weights = None,
    tokens: Annotated[int, typer.Option(min=1, help="Number of windows.")] = 49,
    placement: Annotated[
        Placement,
        typer.Option(
            help="Placement of the windows. salient: drawn with the density of --mask; grid: drawn "
            "without replacement from the patches of the model."
        ),
    ] = "isotropic",
    mask: Annotated[
        Path | None,
        typer.Option(
            help="For salient: an image, scaled to the size of PHOTO, whose brightness is the "
            "density of the windows. Default: the gradient magnitude of PHOTO.",
            show_default=False,
        ),
    ] = None,
    search: Annotated[
        int,
        typer.Option(
            min=0,
            help="Steps of Adam that move the windows, so that the output of the model approaches "
            "its output for all patches; the paths of the windows are drawn.",
        ),
    ] = 0,
    lr: Annotated[
        float,
        typer.Option(
            help="Learning rate of --search, > 0: about the pixels that a window moves per step."
        ),
    ] = 3.0,
    size: common.Size = 448,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random placements.")] = 0,
) -> None:
    """Draws sub-pixel windows and scores the output of a ViT that runs on them, not on patches.

    The image is cropped to whole patches at the right and at the bottom. The score is the cosine
    similarity to the output for all patches. The output is the logits, or the features of a model
    without a classifier, averaged over the tokens if they are per token.

    Example: srt-ext spot photo.jpg -o spot.png --placement salient --search 10
    """
    common.check_output(output, common.FIGURE_SUFFIXES, [photo, *filter(None, [mask])])
    if mask is not None and placement != "salient":
        raise common.fatal(f"--mask requires --placement salient; got {placement}")
    if search and not 0 < lr < math.inf:
        raise common.fatal(f"--lr must be > 0, and finite; got {lr}")
    from ..viz import draw_windows

    common.check_inputs(None, weights)
    image = open_image(photo)
    pixels = to_pixels(image, size)
    text = common.image_size(pixels, image.size)
    density = None if mask is None else read_mask(mask, pixels.shape[:2])
    network = common.load_network(model, weights, None)
    vit = subpixel(network)
    reduced, pixels = pixels, whole_patches(pixels, vit.patch)
    if pixels.shape != reduced.shape:
        text += ", cropped to {} x {}".format(*pixels.shape[1::-1])
    if placement == "salient":
        density = gradient_magnitude(pixels) if density is None else density
        check_density(density[: pixels.shape[0], : pixels.shape[1]], mask)
    start = place(placement, tokens, pixels.shape[:2], vit.patch, seed, density)
    found = approach(vit, network.image(pixels), start, search, lr)
    best = int(found.best[0])
    path = None if found.path is None or not search else found.path[: best + 1, 0]
    common.save_figure(draw_windows(pixels, found.centers[0], vit.patch, path), output, dpi=150)
    common.echo(text)
    report(pixels, vit.patch, tokens, placement, found, output)


def subpixel(network: Network) -> Subpixel:
    from ..spot import Subpixel

    try:
        return Subpixel(network.model)
    except TypeError as reason:
        raise common.fatal(f"--model {network.name}: {reason}") from None


def whole_patches(pixels: np.ndarray, patch: tuple[int, int]) -> np.ndarray:
    """[H, W, 3], cropped to whole patches."""
    height, width = (n - n % p for n, p in zip(pixels.shape, patch, strict=False))
    if not height or not width:
        shown = "{} x {}".format(*pixels.shape[1::-1])
        rule = f"the image must have at least one patch of {patch[1]} x {patch[0]} pixels"
        raise common.fatal(f"{rule}; got {shown}")
    return pixels[:height, :width].copy()


def read_mask(path: Path, size: tuple[int, ...]) -> np.ndarray:
    """[H, W] uint8, the brightness of an image scaled to ``size``."""
    from PIL import Image

    grey = open_image(path).convert("L")
    return np.array(grey.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def gradient_magnitude(pixels: np.ndarray) -> np.ndarray:
    """[H, W], the gradient magnitude of the brightness."""
    grey = pixels.astype(np.float64) @ (0.299, 0.587, 0.114)
    dy, dx = np.gradient(np.pad(grey, 1, "edge"))
    magnitude: np.ndarray = np.hypot(dy, dx)[1:-1, 1:-1]
    return magnitude


def check_density(density: np.ndarray, mask: Path | None) -> None:
    if density.any():
        return
    if mask is not None:
        raise common.fatal(f"--mask {mask} must not be black everywhere in the image")
    raise common.fatal(
        "--placement salient: the image has no gradient; use another placement or --mask"
    )


def place(
    placement: Placement,
    n: int,
    size: tuple[int, ...],
    patch: tuple[int, int],
    seed: int,
    density: np.ndarray | None,
) -> torch.Tensor:
    """[n, 2], (y, x) in pixels of an image of ``size``. density: [H, W], for salient."""
    import torch

    from .. import spot

    if density is not None:
        return spot.salient(torch.from_numpy(density[: size[0], : size[1]].copy()), n, seed)
    if placement == "grid":
        return spot.grid(n, size, patch, seed)
    return spot.PLACEMENTS[placement](n, size, seed)


def approach(
    vit: Subpixel, image: torch.Tensor, start: torch.Tensor, steps: int, lr: float
) -> Search:
    """Searches windows of image [1, 3, H, W] for the output of all patches.

    The loss is 1 - cosine.
    """
    import torch

    from .. import spot

    def distance(output: Any, wanted: torch.Tensor) -> torch.Tensor:
        return 1 - torch.cosine_similarity(vector(output), wanted)

    with torch.no_grad():
        wanted = vector(vit(image, spot.grid(None, image.shape[2:], vit.patch)))
    settings: Any = {"start": start, "loss": distance, "path": True}
    if steps:
        settings["lr"] = lr
    return spot.search(vit, image, wanted, len(start), steps, **settings)


def vector(output: torch.Tensor) -> torch.Tensor:
    """[1, D]: the output, or the mean of its tokens."""
    return output if output.dim() == 2 else output.mean(1)


def report(
    pixels: np.ndarray,
    patch: tuple[int, int],
    tokens: int,
    placement: Placement,
    found: Search,
    output: Path,
) -> None:
    height, width = pixels.shape[:2]
    patches = height * width // (patch[0] * patch[1])
    similarity = (1 - found.loss[:, 0]).tolist()
    best, steps = int(found.best[0]), len(similarity) - 1
    after = f", {similarity[best]:.3f} after {best} of {steps} steps" if steps else ""
    common.echo(
        f"{tokens} windows of {patch[1]} x {patch[0]}, {placement}",
        f"cosine to the output for all {patches} patches: {similarity[0]:.3f}{after}",
        f"wrote {output}",
    )
