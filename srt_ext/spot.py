"""Sub-pixel placement of tokens (SPoT): runs a ViT on a few windows at arbitrary positions.

A window is one patch, centred at a position (y, x) in pixels; pixel centres are at integer + 0.5.

- Placements such as :func:`uniform` and :func:`salient` return n positions.
- :class:`Subpixel` runs a ViT of timm on the windows.
- :func:`search` moves the windows along the gradient of a loss; the model is frozen.

Source: Hjelkrem-Tan et al., "SPoT: Subpixel Placement of Tokens in Vision Transformers", 2025.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from ._validation import check_count, check_number, check_pair, check_tensor, wrong
from .backbones.wrappers import changes_in_training, twin_of, unwrap
from .ops import sample, windows
from .options import Stride
from .views import check_seed, scrambled_sobol

# ---- placements ---------------------------------------------------------------------------------
# Computed in float32 on the CPU as fractions of the image, as published, then scaled to pixels.


def uniform(n: int, size: Stride, seed: int = 0) -> torch.Tensor:
    """n independent positions, uniformly distributed over the image.

    Args:
        n: number of positions, >= 1.
        size: (H, W) of the image in pixels, or one integer for both.
        seed: seed of the random numbers, >= 0 and < 2^63.

    Returns:
        [n, 2], float32: (y, x) in pixels.

    Example:
        >>> uniform(49, (224, 320)).shape
        torch.Size([49, 2])
    """
    n, size, generator = _arguments("uniform", n, size, seed)
    return _pixels(_rand((n, 2), generator), size)


def gauss(n: int, size: Stride, seed: int = 0) -> torch.Tensor:
    """n independent positions, normally distributed around the centre.

    The standard deviation is 1 / pi of the side. Positions outside of the image are moved to its
    edge. Arguments and result as for :func:`uniform`.

    Example:
        >>> gauss(49, 224).shape
        torch.Size([49, 2])
    """
    n, size, generator = _arguments("gauss", n, size, seed)
    normal = torch.randn((n, 2), generator=generator, dtype=torch.float32, device="cpu")
    return _pixels(_normal_to_fraction(normal), size)


def sobol(n: int, size: Stride, seed: int = 0) -> torch.Tensor:
    """n positions of a scrambled Sobol sequence, more even than independent positions.

    The first positions of the sequence also cover the image. Arguments and result as for
    :func:`uniform`.

    Source: Sobol', "On the distribution of points in a cube and the approximate evaluation of
    integrals", 1967.

    Example:
        >>> sobol(64, 224).shape
        torch.Size([64, 2])
    """
    where = "spot.sobol"
    n, size = check_count(where, "n", n, 1), check_pair(where, "size", size)
    return _pixels(scrambled_sobol(n, check_seed(where, seed)).float(), size)


def isotropic(n: int, size: Stride) -> torch.Tensor:
    """n evenly spaced positions in rows, about as far apart along y as along x.

    The published rule rounds the distance to whole pixels and yields about n positions. It is used
    if it yields exactly n, for example for n = k^2 and a square image whose side is a multiple of
    k. Otherwise there are round(sqrt(n H / W)) rows; the last row has fewer positions if n is not a
    multiple of the number of rows, and empty rows are omitted.

    Args:
        n: number of positions, >= 1; may exceed the number of pixels.
        size: (H, W) of the image in pixels, or one integer for both.

    Returns:
        [n, 2], float32: (y, x) in pixels, row by row.

    Example:
        >>> isotropic(4, 32)
        tensor([[ 8.,  8.],
                [ 8., 24.],
                [24.,  8.],
                [24., 24.]])
    """
    where = "spot.isotropic"
    n, size = check_count(where, "n", n, 1), check_pair(where, "size", size)
    return _pixels(_even_fractions(n, size), size)


def center(n: int, size: Stride, spread: float = 0.2) -> torch.Tensor:
    """The positions of :func:`isotropic`, moved towards the centre along both axes.

    A distance d from the centre, as a fraction of the side, becomes d (1 - exp(-(d / spread)^2)).

    Args:
        n, size: as for :func:`isotropic`.
        spread: > 0, as a fraction of the side; a larger spread moves positions closer to the
            centre.

    Returns:
        [n, 2], float32: (y, x) in pixels, row by row.

    Example:
        >>> center(4, 32)
        tensor([[ 9.6769,  9.6769],
                [ 9.6769, 22.3231],
                [22.3231,  9.6769],
                [22.3231, 22.3231]])
    """
    where, rule = "spot.center", "spread must be > 0, and finite"
    n, size = check_count(where, "n", n, 1), check_pair(where, "size", size)
    spread = check_number(where, rule, spread)
    if not 0 < spread < math.inf:
        raise wrong(ValueError, where, rule, spread)
    distance = _even_fractions(n, size) - 0.5
    return _pixels(0.5 + distance * (1 - torch.exp(-((distance / spread) ** 2))), size)


def edge(n: int, size: Stride, seed: int = 0) -> torch.Tensor:
    """n independent positions, most of them near the edges but at least 1 % of the side away.

    Arguments and result as for :func:`uniform`.

    Example:
        >>> edge(49, 224).shape
        torch.Size([49, 2])
    """
    n, size, generator = _arguments("edge", n, size, seed)
    return _pixels(_uniform_to_edge(_rand((n, 2), generator)), size)


def salient(mask: torch.Tensor, n: int, seed: int = 0) -> torch.Tensor:
    """n independent positions with the density of a mask.

    A pixel is drawn with a probability proportional to its value, then a uniform position within
    the pixel. (The published code stretches the positions by S / (S - 1), where S is the side of a
    square mask.)

    Args:
        mask: [H, W], the size of the image: bool, integers or floating-point, >= 0 and finite, not
            all 0.
        n: number of positions, >= 1.
        seed: seed of the random numbers, >= 0 and < 2^63.

    Returns:
        [n, 2], float32, on the CPU: (y, x) in pixels.

    Example:
        >>> salient(torch.eye(224), 49).shape
        torch.Size([49, 2])
    """
    where = "spot.salient"
    n, seed = check_count(where, "n", n, 1), check_seed(where, seed)
    mass = _check_mask(where, mask).flatten()
    generator = torch.Generator("cpu").manual_seed(seed)
    total = mass.cumsum(0)
    # The share is a float32 number, so that share * total < total. right=True: a pixel of value 0
    # is never drawn.
    share = _rand((n,), generator).double() * total[-1]
    pixel = torch.searchsorted(total, share, right=True)
    corner = torch.stack([pixel // mask.shape[1], pixel % mask.shape[1]], 1)
    return (corner + _rand((n, 2), generator).double()).float()


def grid(n: int | None, size: Stride, patch: Stride = 16, seed: int = 0) -> torch.Tensor:
    """The centres of n patches of the grid of the model, drawn without replacement.

    Args:
        n: number of positions, from 1 to the number of whole patches; None: all of them.
        size: (H, W) of the image in pixels, or one integer for both.
        patch: (Ph, Pw) in pixels, or one integer for both.
        seed: seed of the random numbers, >= 0 and < 2^63.

    Returns:
        [n, 2], float32: (y, x) in pixels, row by row.

    Example:
        >>> grid(None, (32, 48))[:2], grid(3, (32, 48)).shape
        (tensor([[ 8.,  8.],
                [ 8., 24.]]), torch.Size([3, 2]))
    """
    where = "spot.grid"
    size, patch = check_pair(where, "size", size), check_pair(where, "patch", patch)
    if n is not None:
        n = check_count(where, "n", n, 1, ", or None")
    seed, (h, w) = check_seed(where, seed), (size[0] // patch[0], size[1] // patch[1])
    if not h * w:
        rule = f"size must be at least one patch of {list(patch)}"
        raise wrong(ValueError, where, rule, list(size))
    if n is None:
        n = h * w
    if n > h * w:
        rule = f"n must be <= {h * w}, the number of {list(patch)} patches in {list(size)} pixels"
        raise wrong(ValueError, where, rule, n)
    axes = [(_range(0, count) + 0.5) * side for count, side in zip((h, w), patch, strict=True)]
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randperm(h * w, generator=generator, device="cpu")[:n].sort().values
    return torch.cartesian_prod(*axes)[drawn]


#: Placements by name, as functions of (n, size, seed).
PLACEMENTS: dict[str, Callable[[int, Stride, int], torch.Tensor]] = {
    "uniform": uniform,
    "gauss": gauss,
    "sobol": sobol,
    "isotropic": lambda n, size, seed: isotropic(n, size),
    "center": lambda n, size, seed: center(n, size),
    "edge": edge,
}


def _arguments(
    name: str, n: object, size: object, seed: object
) -> tuple[int, tuple[int, int], torch.Generator]:
    where = f"spot.{name}"
    count, pair = check_count(where, "n", n, 1), check_pair(where, "size", size)
    return count, pair, torch.Generator("cpu").manual_seed(check_seed(where, seed))


def _rand(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")


def _range(*bounds: int) -> torch.Tensor:
    return torch.arange(*bounds, dtype=torch.float32, device="cpu")


def _pixels(fractions: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """[n, 2] in 0 ... 1 -> pixels, float32."""
    return fractions * torch.tensor(size, dtype=torch.float32, device="cpu")


def _normal_to_fraction(normal: torch.Tensor) -> torch.Tensor:
    return (normal / math.pi + 0.5).clamp(0, 1)


def _uniform_to_edge(fractions: torch.Tensor) -> torch.Tensor:
    m = 2 * fractions - 1
    return ((m.sign() * (1 - m.abs() ** 10) + 1) / 2).clamp(0.01, 0.99)


def _even_fractions(n: int, size: tuple[int, int]) -> torch.Tensor:
    """[n, 2], float32, in 0 ... 1: the positions of :func:`isotropic`."""
    axes = _published_axes(n, size)
    if math.prod(map(len, axes)) != n:
        rows = min(max(1, round(math.sqrt(n * size[0] / size[1]))), n)
        columns = math.ceil(n / rows)
        rows = math.ceil(n / columns)  # without empty rows
        axes = [(_range(0, k) + 0.5) / k for k in (rows, columns)]
    return torch.cartesian_prod(*axes)[:n]


def _published_axes(n: int, size: tuple[int, int]) -> list[torch.Tensor]:
    """Fractions along y and x by the published rule; empty if the distance does not fit."""
    step = math.sqrt(size[0] * size[1] / n)
    if not 1 <= step <= min(size):
        return [torch.empty(0, device="cpu")] * 2
    return [_range(int(step / 2), side, round(step)) / side for side in size]


def _check_mask(where: str, mask: torch.Tensor) -> torch.Tensor:
    """The mask [H, W] in float64 on the CPU."""
    check_tensor(where, "mask", mask)
    if mask.dim() != 2:
        raise wrong(ValueError, where, "mask must be [H, W]", list(mask.shape))
    if mask.is_complex():
        rule = "mask must be bool, integers or floating-point"
        raise wrong(TypeError, where, rule, mask.dtype)
    mass = mask.detach().double().cpu()
    if not (mass.isfinite() & (mass >= 0)).all():
        least, most = (f(mass).item() for f in (torch.min, torch.max)) if mass.numel() else (0, 0)
        raise wrong(
            ValueError, where, "mask must be >= 0, and finite", f"values from {least} to {most}"
        )
    if not mass.any():
        rule = "mask must have a value > 0"
        raise wrong(ValueError, where, rule, f"none in {list(mask.shape)}")
    return mass


# ---- the model ----------------------------------------------------------------------------------


class Subpixel(nn.Module):
    """Runs a ViT of timm on windows at arbitrary positions instead of its grid of patches.

    A window passes through the patch embedding of the model. Its position embedding is the bilinear
    sample of the table of the model at centers / patch, with the edge repeated; on the grid it
    equals the table. Class and register tokens, blocks, norms and head are unchanged, so that the
    windows of the whole grid (:func:`grid`) yield the output of the model. The number of windows is
    arbitrary, and windows may overlap.

    Args:
        model: a ``VisionTransformer`` of timm whose patch embedding is one convolution with a
            stride equal to its kernel; or such a model in ``torch.compile`` or ``DataParallel``,
            whose own forward is not used. The model is shared, not copied. The patch embedding and
            its convolution are not called, so they must not have hooks or an overridden forward.

    Attributes:
        patch: (Ph, Pw), the size of a window in pixels.

    Raises:
        TypeError: ``model`` is not such a model. Models with rotary or relative positions are not
            supported, because their blocks need the positions of the grid.

    Example:
        >>> import timm
        >>> vit = timm.create_model("test_vit", num_classes=10).eval()  # of 160 x 160 pixels
        >>> Subpixel(vit)(torch.zeros(1, 3, 160, 160), isotropic(25, 160)).shape
        torch.Size([1, 10])
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = _check_vit(model)
        _check_forwards(self.model)
        self.patch: tuple[int, int] = tuple(self.model.patch_embed.proj.kernel_size)

    def forward(self, images: torch.Tensor, centers: torch.Tensor) -> Any:
        """The output of the model for windows of images.

        Args:
            images: [B, C, H, W], normalised as the model expects, in the dtype of its patch
                embedding; under autocast in any floating-point dtype. The size is the ``img_size``
                of the model, or any number of whole patches if the model was created with
                ``dynamic_img_size``.
            centers: [B, N, 2], or [N, 2] for all images, float32 or float64: (y, x) in pixels.

        Returns:
            The output of the model, for example logits [B, classes].

        Raises:
            TypeError, ValueError: an argument does not fit the model.
        """
        with self._windowed(images, centers) as model:
            return model(images)

    def forward_features(self, images: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
        """The tokens after the last norm: [B, K + N, D], the K class and register tokens first.

        Arguments as for :meth:`forward`.
        """
        with self._windowed(images, centers) as model:
            tokens: torch.Tensor = model.forward_features(images)
            return tokens

    @contextmanager
    def _windowed(self, images: torch.Tensor, centers: torch.Tensor) -> Iterator[Any]:
        """The model with these windows as its patches; its own forward runs."""
        _check_forwards(self.model)
        _check_images(images, self.model)
        centers = _check_centers(centers, images)
        tokens = self._embed(images, centers)
        own = {
            "patch_embed": lambda _: tokens,
            "pos_embed": self._positions(images, centers),
            "dynamic_img_size": False,  # pos_embed already matches the tokens
            "_compiled_call_impl": None,
        }
        with twin_of(self.model, **own) as twin:
            vars(twin).pop("forward", None)  # it is bound to the original model
            yield twin

    def _embed(self, images: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
        """[B, N, D]. On single windows the convolution is a matrix product."""
        embed = self.model.patch_embed
        for hook in filter(_computes_weight, embed.proj._forward_pre_hooks.values()):
            hook(embed.proj, ())
        pixels = windows(images, centers, self.patch).flatten(2)  # [B, N, C * Ph * Pw]
        tokens: torch.Tensor = embed.norm(
            F.linear(pixels, embed.proj.weight.flatten(1), embed.proj.bias)
        )
        return tokens

    def _positions(self, images: torch.Tensor, centers: torch.Tensor) -> torch.Tensor | None:
        """[B, K + N, D] if the table includes class and register tokens, otherwise [B, N, D]."""
        model, table = self.model, self.model.pos_embed
        if table is None:
            return None
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        h, w = shape = [n // p for n, p in zip(images.shape[2:], self.patch, strict=True)]
        if model.dynamic_img_size:
            from timm.layers.pos_embed import resample_abs_pos_embed

            table = resample_abs_pos_embed(table, shape, model.patch_embed.grid_size, prefix)
        field = table[:, prefix:].transpose(1, 2).unflatten(2, (h, w))  # [1, D, h, w]
        positions = sample(field, centers.reshape(1, -1, 2), self.patch)
        positions = positions.reshape(*centers.shape[:2], field.shape[1])
        return torch.cat([table[:, :prefix].expand(len(images), -1, -1), positions], 1)


def _check_vit(model: Any) -> Any:
    """The VisionTransformer of timm that ``model`` is or wraps."""
    where, inner = "spot.Subpixel", unwrap(model)
    names = [(kind.__module__, kind.__name__) for kind in type(inner).__mro__]
    if ("timm.models.vision_transformer", "VisionTransformer") not in names:
        rule = (
            "model must be a VisionTransformer of timm, without rotary or relative positions, "
            "which need the whole grid"
        )
        raise wrong(TypeError, where, rule, type(inner).__name__)
    proj = getattr(inner.patch_embed, "proj", None)
    plain = isinstance(proj, nn.Conv2d) and (
        proj.stride == proj.kernel_size
        and (proj.padding, proj.dilation, proj.groups) == ((0, 0), (1, 1), 1)
    )
    if not plain or not hasattr(inner.patch_embed, "norm"):
        rule = "the patch embedding must be one nn.Conv2d whose stride equals its kernel size"
        raise wrong(TypeError, where, rule, f"{type(inner.patch_embed).__name__} with proj {proj}")
    return inner


def _check_forwards(model: Any) -> None:
    """Raises a TypeError for a forward or a hook that would be bypassed or see other patches."""
    from timm.layers.patch_embed import PatchEmbed

    where, embed = "spot.Subpixel", model.patch_embed
    _check_not_set(model, "the model")
    plain = (("patch_embed", embed, PatchEmbed), ("patch_embed.proj", embed.proj, nn.Conv2d))
    for name, module, kind in plain:
        _check_not_set(module, name)
        if type(module).forward is not kind.forward:
            rule = f"{name} is not called and must have the forward of {kind.__name__}"
            raise wrong(TypeError, where, rule, type(module).__name__)
        hooks = [*module._forward_hooks.values(), *module._backward_hooks.values()]
        hooks += [*module._forward_pre_hooks.values(), *module._backward_pre_hooks.values()]
        for hook in hooks:
            if name == "patch_embed" or not _computes_weight(hook):
                got = getattr(hook, "__qualname__", type(hook).__name__)
                rule = f"{name} is not called and must have no hooks"
                raise wrong(TypeError, where, rule, got)


def _check_not_set(module: Any, name: str) -> None:
    # After accelerate's hooks are removed, a bound copy of the class's forward remains.
    forward = vars(module).get("forward")
    if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        rule = f"{name} must use the forward of its class, not one set on the instance"
        got = getattr(forward, "__qualname__", forward)
        raise wrong(TypeError, "spot.Subpixel", rule, got)


def _computes_weight(hook: object) -> bool:
    """Whether it is a pre-hook of torch.nn.utils: weight_norm, spectral_norm or pruning."""
    return type(hook).__module__.startswith("torch.nn.utils.")


def _check_images(images: torch.Tensor, model: Any) -> None:
    where, embed = "spot.Subpixel", model.patch_embed
    check_tensor(where, "images", images)
    channels = embed.proj.in_channels
    if images.dim() != 4 or images.shape[1] != channels:
        rule = f"images must be [B, {channels}, H, W]"
        raise wrong(ValueError, where, rule, list(images.shape))
    dtype = next(embed.proj.parameters()).dtype  # .weight may be computed by a parametrisation
    if torch.is_autocast_enabled(images.device.type):
        if not images.is_floating_point():
            raise wrong(TypeError, where, "images must be floating-point", images.dtype)
    elif images.dtype != dtype:
        rule = f"images must be {dtype}, as the patch embedding, outside of autocast"
        raise wrong(TypeError, where, rule, images.dtype)
    size, patch = tuple(images.shape[2:]), embed.proj.kernel_size
    if not model.dynamic_img_size and size != tuple(embed.img_size):
        rule = (
            f"images must have {list(embed.img_size)} pixels; timm's create_model(..., "
            "dynamic_img_size=True) or model.set_input_size(...) change the accepted size"
        )
        raise wrong(ValueError, where, rule, list(size))
    if any(n % p or n == 0 for n, p in zip(size, patch, strict=True)):
        rule = f"images must consist of whole patches of {list(patch)} pixels"
        raise wrong(ValueError, where, rule, list(size))


def _check_centers(centers: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """[B, N, 2] on the device of the images."""
    where, count = "spot.Subpixel", len(images)
    check_tensor(where, "centers", centers)
    fits = centers.dim() in (2, 3) and centers.shape[-1] == 2 and centers.shape[-2] >= 1
    if not fits or (centers.dim() == 3 and len(centers) != count):
        rule = f"centers must be [N, 2] or [B, N, 2] with N >= 1 and B = {count}"
        raise wrong(ValueError, where, rule, list(centers.shape))
    return centers.to(images.device).expand(count, -1, -1)


# ---- search -------------------------------------------------------------------------------------

Loss = Callable[[Any, torch.Tensor], torch.Tensor]


class Search(NamedTuple):
    """The result of :func:`search`, with E evaluations: at the start and after each step."""

    #: [B, n, 2], float32, (y, x) in pixels: the positions with the least loss of each image
    centers: torch.Tensor
    loss: torch.Tensor  #: [E, B]
    #: [E, B], bool: the predicted class is the label. None: the labels are not classes
    agreement: torch.Tensor | None
    path: torch.Tensor | None  #: [E, B, n, 2] in pixels; None unless requested

    @property
    def best(self) -> torch.Tensor:
        """[B], int64: the index of the evaluation with the least loss of each image."""
        return self.loss.nan_to_num(math.inf).argmin(0)


@torch.inference_mode(False)
def search(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    n: int,
    steps: int = 10,
    lr: float = 3.0,
    *,
    start: str | torch.Tensor = "isotropic",
    loss: Loss | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    clamp: bool = True,
    path: bool = False,
    seed: int = 0,
) -> Search:
    """Moves n windows of each image to decrease a loss; the model is frozen.

    Only the positions are optimised, and the best positions of each image are returned. With the
    true labels, the search is an oracle: it measures how much good positions improve the output,
    but needs the labels to find them.

    Args:
        model: a :class:`Subpixel`, or a model for it; in eval mode.
        images: [B, C, H, W], as for :meth:`Subpixel.forward`. The search needs the memory of a
            training step on B images of n tokens.
        labels: [B], int64, for the cross-entropy; for another loss, any tensor that it accepts.
        n: number of windows per image, >= 1.
        steps: number of steps of the optimiser, >= 0.
        lr: learning rate, > 0; with Adam, about the number of pixels by which a window moves along
            an axis in one step.
        start: a name in :data:`PLACEMENTS`, for the same positions in all images; or positions
            [n, 2] or [B, n, 2] in pixels, finite.
        loss: a function (output of the model, labels) -> [B], one value per image. None:
            cross-entropy.
        optimizer: a class of ``torch.optim``, or a function; it is called as
            ``optimizer([positions], lr=lr)``. Weight decay is set to 0, because it would pull the
            positions towards (0, 0).
        clamp: keep the positions within the image; ``start`` is clamped, too.
        path: return the positions of all evaluations.
        seed: seed of a random ``start``, >= 0 and < 2^63.

    Returns:
        :class:`Search`, on the device of the images. E is ``steps`` + 1 for optimisers that
        evaluate once per step (all except LBFGS).

    Raises:
        TypeError, ValueError: an argument is invalid; the model is in training mode; the loss has
            no gradient with respect to the output of the model.

    Example:
        >>> import timm
        >>> vit = timm.create_model("test_vit").eval()
        >>> images = torch.zeros(2, 3, 160, 160)
        >>> found = search(vit, images, vit(images).argmax(1), n=25, steps=2)
        >>> found.centers.shape, found.agreement.shape
        (torch.Size([2, 25, 2]), torch.Size([3, 2]))
    """
    where, rule = "spot.search", "lr must be > 0, and finite"
    vit = model if isinstance(model, Subpixel) else Subpixel(model)
    if changes_in_training(vit):
        raise wrong(ValueError, where, "the model must be in eval mode", "training mode")
    steps, lr = check_count(where, "steps", steps, 0), check_number(where, rule, lr)
    if not 0 < lr < math.inf:
        raise wrong(ValueError, where, rule, lr)
    _check_images(images, vit.model)
    check_tensor(where, "labels", labels)
    if not callable(optimizer):
        rule = "optimizer must be callable, as optimizer([positions], lr=lr)"
        raise wrong(TypeError, where, rule, type(optimizer).__name__)
    images, labels = _usable(images), _usable(labels.to(images.device))
    centers = _starts(start, n, images, seed)
    if clamp:
        _clamp_(centers, images)
    chosen = optimizer([centers.requires_grad_()], lr=lr)
    for group in chosen.param_groups:
        if "weight_decay" in group:
            group["weight_decay"] = 0.0
    record: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []

    def evaluate(gradient: bool = True) -> torch.Tensor:
        with torch.set_grad_enabled(gradient):
            output = vit(images, centers)
            losses = _losses(loss, output, labels, len(images))
            total = losses.sum()  # each image gets the gradient of its own loss
        if gradient:
            centers.grad = _gradient(total, centers)
        record.append((centers.detach().clone(), losses.detach(), _agreement(output, labels)))
        return total.detach()

    for _ in range(steps):
        chosen.step(evaluate)  # type: ignore[arg-type]
        if clamp:
            _clamp_(centers.detach(), images)
    evaluate(gradient=False)
    return _best_of(record, path)


def _usable(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that autograd can save: tensors of the inference mode are copied."""
    return tensor.clone() if tensor.is_inference() else tensor


def _gradient(total: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """[B, n, 2]; values that are not finite become 0."""
    grad = None
    if total.requires_grad:
        (grad,) = torch.autograd.grad(total, [centers], allow_unused=True)
    if grad is None:
        rule = "loss must have a gradient with respect to the output of the model"
        raise wrong(ValueError, "spot.search", rule, "a value without one")
    return grad.nan_to_num(0, 0, 0)


def _starts(start: str | torch.Tensor, n: int, images: torch.Tensor, seed: int) -> torch.Tensor:
    """[B, n, 2], float32: a new tensor on the device of the images."""
    where = "spot.search"
    n = check_count(where, "n", n, 1)
    if isinstance(start, str):
        if start not in PLACEMENTS:
            names = ", ".join(f"'{name}'" for name in PLACEMENTS)
            rule = f"start must be positions or one of {names}"
            raise wrong(ValueError, where, rule, repr(start))
        start = PLACEMENTS[start](n, list(images.shape[2:]), seed)
    check_tensor(where, "start", start)
    shape = (len(images), n, 2)
    if start.shape not in (shape, shape[1:]):
        rule = f"start must be [n, 2] or [B, n, 2] with n = {n} and B = {len(images)}"
        raise wrong(ValueError, where, rule, list(start.shape))
    if not start.isfinite().all():
        count = int((~start.isfinite()).sum())
        raise wrong(ValueError, where, "start must be finite", f"{count} values that are not")
    return start.detach().to(images.device, torch.float32).expand(shape).clone()


def _losses(loss: Loss | None, output: Any, labels: torch.Tensor, count: int) -> torch.Tensor:
    """[B], B = count."""
    where = "spot.search"
    if loss is None:
        _check_labels(output, labels)
        return F.cross_entropy(output, labels, reduction="none")
    losses = loss(output, labels)
    check_tensor(where, "the result of loss", losses)
    if losses.shape != (count,):
        rule = f"loss must return one value per image, [{count}]"
        raise wrong(ValueError, where, rule, list(losses.shape))
    return losses


def _check_labels(output: Any, labels: torch.Tensor) -> None:
    """Checks the arguments of the cross-entropy."""
    where = "spot.search"
    if not isinstance(output, torch.Tensor) or output.dim() != 2:
        got = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        rule = "without a loss, the model must return logits [B, classes]"
        raise wrong(ValueError, where, rule, got)
    rule = f"labels must be int64 [{len(output)}], from 0 to {output.shape[1] - 1}"
    if labels.dtype != torch.int64:
        raise wrong(TypeError, where, rule, labels.dtype)
    if labels.shape != output.shape[:1]:
        raise wrong(ValueError, where, rule, list(labels.shape))
    if not ((labels >= 0) & (labels < output.shape[1])).all():
        got = f"labels from {labels.min().item()} to {labels.max().item()}"
        raise wrong(ValueError, where, rule, got)


def _agreement(output: Any, labels: torch.Tensor) -> torch.Tensor | None:
    """[B], bool; None if the output or the labels are not classes."""
    if not isinstance(output, torch.Tensor) or output.dim() != 2 or labels.dtype != torch.int64:
        return None
    return output.detach().argmax(1) == labels if labels.shape == output.shape[:1] else None


def _clamp_(centers: torch.Tensor, images: torch.Tensor) -> None:
    for axis, side in enumerate(images.shape[2:]):
        centers[..., axis].clamp_(0, side)


def _best_of(
    record: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]], path: bool
) -> Search:
    centers, losses, decisions = zip(*record, strict=True)
    agreement = None if decisions[0] is None else torch.stack(decisions)
    every, images = torch.stack(centers), torch.arange(centers[0].shape[0])
    found = Search(every, torch.stack(losses), agreement, every if path else None)
    return found._replace(centers=every[found.best, images.to(every.device)])
