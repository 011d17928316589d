"""Figures of features: PCA colours, colour maps, and SRT compared with plain tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch

from ._memory import free_bytes
from .backbones import Backbone
from .ops import ensemble, ensemble_moments
from .options import Quality, Reduce
from .srt import SRT, ViewTokens, _Frame

if TYPE_CHECKING:
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure


class PCAColors:
    """Maps features to RGB with the first three principal components of given features.

    The basis and the range are fitted once to ``features`` [1, C, h, w] of any dtype, so that the
    colours of later calls can be compared.
    """

    def __init__(self, features: torch.Tensor) -> None:
        from sklearn.decomposition import PCA

        rows = _rows(features)
        self._pca = PCA(n_components=3, svd_solver="full").fit(rows)
        self._low, self._high = np.percentile(self._pca.transform(rows), [2, 98], axis=0)

    def __call__(self, features: torch.Tensor) -> np.ndarray:
        """features [1, C, h, w] -> RGB [h, w, 3], float32 in 0 .. 1."""
        shifted = self._pca.transform(_rows(features)) - self._low
        scaled = np.clip(shifted / np.maximum(self._high - self._low, 1e-12), 0, 1)
        rgb: np.ndarray = scaled.reshape(*features.shape[-2:], 3)
        return rgb.astype(np.float32)


def _rows(features: torch.Tensor) -> np.ndarray:
    """[1, C, h, w] -> [h * w, C], float32."""
    return features[0].permute(1, 2, 0).flatten(0, 1).float().cpu().numpy()


def color_map(low: float, high: float, name: str) -> ScalarMappable:
    """A colour map of matplotlib from ``low`` to ``high``; other values are clipped."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(low, high, clip=True), name)


def cosine_map(features: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """features [1, C, h, w], vector [C] -> cosine similarity [h, w]."""
    return torch.cosine_similarity(features[0], vector[:, None, None], dim=0)


def enlarge(image: np.ndarray, cell: tuple[int, int], size: tuple[int, ...]) -> np.ndarray:
    """[h, w, C] with cells of (y, x) pixels -> [H, W, C] by repetition, cropped to ``size``."""
    return image.repeat(cell[0], 0).repeat(cell[1], 1)[: size[0], : size[1]]


class Tokens(NamedTuple):
    """The tokens of one layer for V views of an image."""

    all: torch.Tensor  # [V, 1, N, C], N = h * w
    grid: tuple[int, int]  # (h, w)
    patch: tuple[int, int]  # (y, x), pixels of the enlarged image
    frame: _Frame

    @property
    def map(self) -> torch.Tensor:
        """The tokens of the first view, [1, C, h, w]."""
        return self.all[0].transpose(1, 2).reshape(1, -1, *self.grid)


class LayerTokens(NamedTuple):
    """The tokens of one layer."""

    plain: Tokens  # of the unshifted image
    views: Tokens  # of all views


class Panel(NamedTuple):
    """One image of a figure."""

    title: str
    rgb: np.ndarray  # [H, W, 3] in 0 .. 1
    point: tuple[float, float] | None = None  # (x, y) of a mark, in pixels


class _LayerStyle:
    """Settings of one layer that the first image determines, so that images can be compared."""

    noise: ScalarMappable | None = None
    similarity: ScalarMappable | None = None

    def __init__(self, plain: Tokens) -> None:
        if plain.grid[0] * plain.grid[1] < 3:
            rule = "the image must have at least 3 tokens for PCA colours"
            raise ValueError(f"{rule}; got {plain.grid[0] * plain.grid[1]}")
        self.colors = PCAColors(plain.map)
        self.query: list[torch.Tensor] = []  # [C] of the plain tokens, [C] of the mean


class Comparison:
    """Draws the plain tokens of images next to the fields of SRT, for each layer of a model.

    The first image determines the colours, the ranges and the features of the queried point, so
    that later images can be compared with it.

    Memory: the tokens of all views at all layers, from one pass over the views, plus one field (two
    with ``noise``) and its colours.

    Args:
        backbone: from :func:`srt_ext.backbones.describe`, for a list of layers.
        views, scale, quality, stride, view_batch: as for :class:`srt_ext.SRT`.
        noise: also draw the noise map.
        query: (x, y) as fractions of width and height: also draw the cosine similarity to the
            features at this point.

    Attributes:
        srt_seconds: the time for the last image: shifting, the model, the mean and the noise.
    """

    def __init__(
        self,
        backbone: Backbone,
        views: str | None = None,
        *,
        scale: float | None = None,
        quality: Quality | None = None,
        stride: int = 1,
        view_batch: int = 8,
        noise: bool = False,
        query: tuple[float, float] | None = None,
    ) -> None:
        settings: Any = {"stride": stride, "view_batch": view_batch}
        self.srt = SRT(backbone, views, scale=scale, quality=quality, **settings)
        self.plain = SRT(backbone, 1, **settings)
        self.stride, self.noise, self.query = stride, noise, query
        self.srt_seconds = 0.0
        self._styles: list[_LayerStyle] = []

    @torch.no_grad()
    def __call__(
        self,
        image: torch.Tensor,
        pixels: np.ndarray,
        progress: Callable[[int], object] | None = None,
    ) -> list[list[Panel]]:
        """The panels of each layer.

        Args:
            image: [1, 3, H, W], normalised as the model expects.
            pixels: the same image for display, [H, W, 3] uint8.
            progress: is called with the number of finished views.

        Raises:
            ValueError: the image has fewer than 3 tokens; the tokens do not fit into memory.
        """
        start = time.perf_counter()
        layers = self.tokens(image, progress)
        self.srt_seconds = time.perf_counter() - start
        first = not self._styles
        styles = self._styles or [_LayerStyle(layer.plain) for layer in layers]
        pairs = zip(layers, styles, strict=True)
        rows = [self._row(layer, style, pixels, first) for layer, style in pairs]
        self._styles = styles  # only if the image did not fail
        return rows

    def tokens(
        self, image: torch.Tensor, progress: Callable[[int], object] | None = None
    ) -> list[LayerTokens]:
        """The tokens of image [1, 3, H, W] and of its views at each layer."""
        parts = (self._tokens(self.plain, image, None), self._tokens(self.srt, image, progress))
        return [LayerTokens(*layer) for layer in zip(*parts, strict=True)]

    def _tokens(self, srt: SRT, image: torch.Tensor, progress: Any) -> list[Tokens]:
        kept: list[Tokens] = []
        done, total, frame = 0, len(srt.views.offsets), srt._frame(image)
        for batch in srt.tokens(image):
            if not kept:
                self._check_memory(batch, 1 + total, frame)
                for tokens, grid, patch, _ in batch.layers:
                    all_views = tokens.new_empty(total, *tokens.shape[1:])
                    kept.append(Tokens(all_views, grid, patch, frame))
            for layer, new in zip(kept, batch.layers, strict=True):
                layer.all[done : done + len(batch.offsets)] = new.tokens
            done += len(batch.offsets)
            if progress is not None:
                progress(done)
        return kept

    def _check_memory(self, batch: ViewTokens, views: int, frame: _Frame) -> None:
        layers, free = batch.layers, free_bytes(frame.image.device)
        channels = max(layer.tokens.shape[3] for layer in layers)
        needed = sum(views * layer.tokens[0].nbytes for layer in layers)
        needed += (3 if self.noise else 2) * 4 * frame.cells * channels
        if needed > free:
            raise ValueError(
                f"not enough memory: {views} views at {len(layers)} layers and a field need "
                f"{needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free: use a smaller --size "
                "or --scale, a larger --stride or fewer --views"
            )

    def field(self, layer: LayerTokens, reduce: str) -> torch.Tensor:
        """[1, C, ceil(H / s), ceil(W / s)] for an image of (H, W) pixels and stride s.

        ``reduce``: ``mean``, ``median`` (unweighted) or ``bilinear``, the upsampled plain tokens.
        """
        bilinear = reduce == "bilinear"
        tokens, srt = (layer.plain, self.plain) if bilinear else (layer.views, self.srt)
        weights = srt._views.weights if reduce == "mean" else None
        args = (tokens.all, srt._views.offsets, tokens.grid, tokens.patch, weights)
        kind = "mean" if bilinear else cast(Reduce, reduce)
        return tokens.frame.cropped(ensemble(*args, reduce=kind, stride=tokens.frame.stride))

    def moments(self, layer: LayerTokens) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean, as in :meth:`field`, and the noise map [H', W']: the norm of the deviations."""
        tokens, (offsets, weights, _) = layer.views, self.srt._views
        args = (tokens.all, offsets, tokens.grid, tokens.patch, weights)
        fields = ensemble_moments(*args, stride=tokens.frame.stride)
        mean, var = map(tokens.frame.cropped, fields)
        return mean, var[0].float().sum(0).sqrt()

    def _row(
        self, layer: LayerTokens, style: _LayerStyle, pixels: np.ndarray, first: bool
    ) -> list[Panel]:
        size, cell, noise = pixels.shape[:2], (self.stride, self.stride), None
        start = time.perf_counter()
        if self.noise:
            mean, noise = self.moments(layer)
        else:
            mean = self.field(layer, "mean")
        self.srt_seconds += time.perf_counter() - start

        more, point = [], None
        if noise is not None:
            low, high = np.percentile(noise, [2, 98])
            style.noise = style.noise or color_map(low, high, "gray")
            rgb = style.noise.to_rgba(noise.numpy())[..., :3]
            more.append(Panel("noise: spread of the views", enlarge(rgb, cell, size)))
        if self.query is not None:
            if first:  # in later images the object at the point may have moved
                point = (self.query[0] * size[1], self.query[1] * size[0])
            more += self._similarity(layer.plain, mean, style, point, size)

        def colors(field: torch.Tensor) -> np.ndarray:
            return enlarge(style.colors(field), cell, size)

        views, scale = self.srt.views, self.srt.scale
        unweighted = "" if views.weights is None else ", unweighted"
        enlarged = "" if scale == 1 else f", scale {scale:g}"
        srt = Panel(f"SRT mean, {len(views.offsets)} views{enlarged}", colors(mean))
        del mean  # frees it before the next field
        plain = enlarge(style.colors(layer.plain.map), layer.plain.patch, size)
        return [
            Panel("input", pixels.astype(np.float32) / 255, point),
            Panel("plain tokens", plain),
            Panel("tokens, bilinear", colors(self.field(layer, "bilinear"))),
            srt,
            Panel(f"SRT median{unweighted}", colors(self.field(layer, "median"))),
            *more,
        ]

    def _similarity(
        self, tokens: Tokens, mean: torch.Tensor, style: _LayerStyle, point: Any, size: Any
    ) -> list[Panel]:
        """The cosine similarity of tokens and mean to the point in the first image."""
        fields, cells = (tokens.map, mean), (tokens.patch, (self.stride, self.stride))
        if not style.query:
            assert point is not None
            style.query = [
                field[0, :, int(point[1]) // cell[0], int(point[0]) // cell[1]].clone()
                for field, cell in zip(fields, cells, strict=True)
            ]
        maps = [cosine_map(*pair).numpy() for pair in zip(fields, style.query, strict=True)]
        if style.similarity is None:  # one range for both maps
            style.similarity = color_map(min(np.percentile(m, 2) for m in maps), 1.0, "inferno")
        panels = []
        for name, values, cell in zip(("tokens", "SRT"), maps, cells, strict=True):
            title = f"cosine to the point, {name}: {style.similarity.norm.vmin:.2f} ... 1"
            rgb = style.similarity.to_rgba(values)[..., :3]
            panels.append(Panel(title, enlarge(rgb, cell, size), point))
        return panels


def draw(rows: Sequence[Sequence[Panel]], names: Sequence[str]) -> Figure:
    """A figure with rows of panels of one size. Several rows are labelled with ``names``."""
    from matplotlib.figure import Figure

    height, width = rows[0][0].rgb.shape[:2]
    inch = 4.0
    figsize = (inch * len(rows[0]), len(rows) * (inch * height / width + 0.4))
    figure = Figure(figsize=figsize, layout="constrained")
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for line, panels, name in zip(grid, rows, names, strict=True):
        for axes, panel in zip(line, panels, strict=True):
            axes.imshow(panel.rgb, interpolation="nearest")
            axes.set(title=panel.title, xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if panel.point is not None:
                for colour, edge in (("black", 3.0), ("white", 1.2)):
                    x, y = panel.point
                    axes.plot(x - 0.5, y - 0.5, "+", ms=14, mew=edge, color=colour)
        if len(rows) > 1:
            line[0].set_ylabel(name, fontsize="large")
    return figure


def draw_windows(
    pixels: np.ndarray,
    centers: torch.Tensor,
    patch: tuple[int, int],
    path: torch.Tensor | None = None,
) -> Figure:
    """A figure of windows on an image.

    Args:
        pixels: [H, W, 3] uint8.
        centers: [n, 2], (y, x) in pixels.
        patch: the size of a window, (y, x) in pixels.
        path: [E, n, 2], earlier centres, drawn as lines; None: no lines.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    height, width = pixels.shape[:2]
    figure = Figure(figsize=(8, 8 * height / width), layout="constrained")
    axes = figure.subplots()
    axes.imshow(pixels)
    axes.set(xticks=[], yticks=[])
    axes.autoscale(False)  # windows may reach beyond the image
    axes.spines[:].set_visible(False)
    # imshow draws the centre of pixel i at coordinate i.
    if path is not None:
        for y, x in path.permute(1, 2, 0).cpu() - 0.5:
            axes.plot(x, y, color="orange", linewidth=1.2)
    for y, x in (centers.cpu() - torch.tensor(patch) / 2 - 0.5).tolist():
        for color, line in (("black", 2.0), ("white", 1.0)):
            place: Any = ((x, y), patch[1], patch[0])
            axes.add_patch(Rectangle(*place, fill=False, edgecolor=color, linewidth=line))
    return figure


def render(figure: Figure) -> Any:
    """A frame of a video: an image of Pillow with 288 pixels per panel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    figure.set_dpi(72)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
