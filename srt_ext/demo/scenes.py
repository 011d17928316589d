"""Procedural scenes with exact labels: solids on a floor, rendered with one ray per pixel.

Every solid is a unit shape with a rotation and three radii, so that each kind of solid needs one
intersection function. Materials, light, camera and noise vary. The labels of a pixel are exact for
the ray through its centre.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter

CLASSES = ("background", "floor", "box", "ball", "cylinder", "cone")
BACKGROUND, FLOOR, BOX, BALL, CYLINDER, CONE = range(6)

Vectors = np.ndarray  # [..., 3], x to the right, y up, z away from the camera; metres
FAR = 1e6  # metres: no hit
AIM = 4.0  # metres: objects at this distance stay in the centre when the camera moves sideways


class Scene(NamedTuple):
    """An image and its exact labels."""

    pixels: np.ndarray  # [H, W, 3] uint8
    labels: np.ndarray  # [H, W] uint8, of CLASSES
    nearness: np.ndarray  # [H, W] float32, 1 / metres along the camera's axis; 0: background
    solids: np.ndarray  # [H, W] uint8, the number of the solid, from 1; 0: none


class _Solid(NamedTuple):
    kind: int
    centre: Vectors  # [3]
    turn: np.ndarray  # [3, 3], columns are its axes
    radii: Vectors  # [3]
    material: _Material


def scene(seed: int, height: int, width: int, *, rods: int = 0, step: float = 0.0) -> Scene:
    """Renders a scene, which is determined by the seed and the size.

    Args:
        seed: >= 0.
        height, width: size of the image in pixels.
        rods: number of thin solids to add; they have the first numbers.
        step: metres by which the camera moves to the right; it turns so that the centre of the
            image stays in view.

    Example:
        >>> scene(0, 32, 48).pixels.shape
        (32, 48, 3)
    """
    random, more = (np.random.default_rng(s) for s in (seed, (seed, 1)))
    eye, rays, forward = _camera(random, height, width, step)
    solids = [_rod(more) for _ in range(rods)]
    solids += [_solid(random) for _ in range(random.integers(4, 14))]
    floor, wall = _Material(random), _Material(random)
    distance = np.full(len(rays), FAR)
    labels = np.full(len(rays), BACKGROUND, dtype=np.uint8)
    numbers = np.zeros_like(labels)
    normals = np.zeros_like(rays)
    colours = _sky(random, rays, wall)
    light = _unit(np.array([random.normal(), random.uniform(0.4, 1.5), random.normal() - 0.4]))

    to_floor = eye[1] / np.maximum(-rays[:, 1], 1e-6)
    hit = to_floor < 60
    distance[hit], labels[hit], normals[hit] = to_floor[hit], FLOOR, (0, 1, 0)
    colours[hit] = floor((eye + rays[hit] * to_floor[hit, None]) * (1, 0, 1))
    for number, solid in enumerate(solids, 1):
        reached = _reached(solid, eye[None], rays)
        if not len(reached):
            continue
        t, normal = _intersect(solid, eye[None], rays[reached])
        nearer = t < distance[reached]
        index = reached[nearer]
        distance[index], labels[index], normals[index] = t[nearer], solid.kind, normal[nearer]
        numbers[index] = number
        local = (eye + rays[index] * t[nearer, None] - solid.centre) @ solid.turn
        colours[index] = solid.material(local)

    seen = np.flatnonzero(labels != BACKGROUND)
    points = eye + rays[seen] * distance[seen, None] + normals[seen] * 1e-3
    lit = normals[seen] @ light
    shadow = np.zeros(len(seen), dtype=bool)
    for solid in solids:
        reached = _reached(solid, points, light[None])
        if len(reached):
            shadow[reached] |= _intersect(solid, points[reached], light[None])[0] < FAR
    ambient = random.uniform(0.25, 0.55)
    sun = np.where(shadow, 0, np.clip(lit, 0, None)) * random.uniform(0.6, 1.1)
    tint = 1 + random.normal(0, 0.12, 3)
    half = _unit(light - rays[seen])
    shine = np.where(shadow, 0, np.clip(_dot(normals[seen], half), 0, 1) ** 30)
    gloss = random.uniform(0, 0.35) * (labels[seen] != FLOOR)
    colours[seen] *= (ambient + sun[:, None] * tint) * (0.75 + 0.25 * normals[seen, 1:2])
    colours[seen] += (shine * gloss)[:, None]
    fog = 1 - np.exp(-np.minimum(distance[seen], 60) * random.exponential(0.012))
    colours[seen] += (random.uniform(0.4, 0.9, 3) - colours[seen]) * fog[:, None]

    depth = distance * (rays @ forward)
    nearness = np.where(labels == BACKGROUND, 0, 1 / np.maximum(depth, 1e-3))
    shape = (height, width)
    return Scene(
        _photographed(random, colours.reshape(*shape, 3), more if step else random),
        labels.reshape(shape),
        nearness.reshape(shape).astype(np.float32),
        numbers.reshape(shape),
    )


def _dot(a: Vectors, b: Vectors) -> Any:
    return np.einsum("...i,...i->...", a, b)  # sums over an axis of 3 are slow


def _unit(vectors: Vectors) -> Any:
    return vectors / np.sqrt(_dot(vectors, vectors))[..., None]


def _turn(axis: int, angle: float) -> np.ndarray:
    """A rotation about an axis of the scene."""
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = np.cos(angle)
    matrix[i, j], matrix[j, i] = -np.sin(angle), np.sin(angle)
    return matrix


def _camera(
    random: np.random.Generator, height: int, width: int, step: float
) -> tuple[Vectors, Vectors, Vectors]:
    """The eye [3], a unit vector through the centre of each pixel [H * W, 3], and the axis [3]."""
    eye = np.array([step, random.uniform(0.7, 2.4), 0])
    turn = _turn(0, random.uniform(0.05, 0.55)) @ _turn(2, random.normal(0, 0.05))
    turn = _turn(1, -np.arctan(step / AIM)) @ turn
    slope = np.tan(random.uniform(0.35, 0.6))  # of the longer side, from the centre to the edge
    y, x = np.mgrid[:height, :width]
    side = max(height, width)
    right = (2 * x + 1 - width) / side * slope
    up = (height - 2 * y - 1) / side * slope
    rays = np.stack([right, up, np.ones_like(right)], 2).reshape(-1, 3)
    return eye, _unit(rays @ turn.T), turn[:, 2]


def _solid(random: np.random.Generator) -> _Solid:
    """A solid on the floor in front of the camera, upright or tilted."""
    kind = int(random.integers(BOX, CONE + 1))
    turn = _turn(1, random.uniform(0, 2 * np.pi))
    if random.random() < 0.3:
        turn = turn @ _turn(0, random.uniform(0, 2 * np.pi)) @ _turn(2, random.uniform(0, 6.3))
    radii = random.uniform(0.18, 0.6) * random.uniform(0.7, 1.4, 3)
    if kind == BALL:
        radii[:] = radii[0] * random.uniform(0.85, 1.2, 3)
    if kind in (CYLINDER, CONE):
        radii[2] = radii[0]
        radii[1] *= random.uniform(0.8, 2)
    ahead = np.exp(random.uniform(np.log(1.5), np.log(8)))
    across = random.uniform(-0.75, 0.75) * ahead
    axes = turn[1] * radii  # the contribution of each axis to the height
    # Too large for a cone on its tip, which floats a little.
    reach = np.abs(axes[1]) + np.hypot(axes[0], axes[2])
    if kind in (BALL, BOX):
        reach = np.linalg.norm(axes) if kind == BALL else np.abs(axes).sum()
    return _Solid(kind, np.array([across, reach, ahead]), turn, radii, _Material(random))


def _rod(random: np.random.Generator) -> _Solid:
    """A post or a leaning bar, 3 to 7 cm thick."""
    radii = random.uniform(0.015, 0.035) + np.array([0, random.uniform(0.3, 0.9), 0])
    turn = _turn(1, random.uniform(0, 2 * np.pi)) @ _turn(0, random.uniform(-0.6, 0.6))
    ahead = np.exp(random.uniform(np.log(1.5), np.log(5)))
    across = random.uniform(-0.5, 0.5) * ahead
    kind = (BOX, CYLINDER)[random.integers(2)]
    height = np.abs(turn[1] * radii).sum()
    return _Solid(kind, np.array([across, height, ahead]), turn, radii, _Material(random))


def _reached(solid: _Solid, origins: Vectors, rays: Vectors) -> np.ndarray:
    """Indices of the rays [M or 1, 3] that pass near a solid; the other rays cannot hit it."""
    to_centre = solid.centre - origins
    along = _dot(to_centre, rays)
    apart = _dot(to_centre, to_centre) - along**2
    radius2 = 3 * solid.radii.max() ** 2
    return np.flatnonzero((apart < radius2) & (along > -np.sqrt(radius2)))


def _intersect(solid: _Solid, origins: Vectors, rays: Vectors) -> tuple[np.ndarray, Vectors]:
    """Distances [M] to the first hit, or FAR, and the outward normals [M, 3].

    Origins must be outside of the solid.
    """
    o = (origins - solid.centre) @ solid.turn / solid.radii
    d = rays @ solid.turn / solid.radii
    o, d = np.broadcast_arrays(o, d)
    with np.errstate(divide="ignore", invalid="ignore"):  # NaN and inf fail every comparison
        if solid.kind == BOX:
            t, normal = _box(o, d)
        elif solid.kind == BALL:
            t = _first(*_roots(_dot(d, d), _dot(o, d), _dot(o, o) - 1), o, d, 2)
            normal = o + d * t[:, None]
        else:
            t, normal = _round(o, d, solid.kind == CONE)
    return t, _unit(normal / solid.radii @ solid.turn.T + 1e-12)


def _roots(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The roots of a t^2 + 2 b t + c; NaN if there are none."""
    root = np.sqrt(b * b - a * c)
    return (-b - root) / a, (-b + root) / a


def _first(near: np.ndarray, far: np.ndarray, o: Vectors, d: Vectors, height: float) -> np.ndarray:
    """The smallest positive t whose point is at most ``height`` from the centre in y."""
    found = np.full(len(o), FAR)
    for t in (far, near):
        fits = (t > 0) & (np.abs(o[:, 1] + t * d[:, 1]) <= height) & (t < FAR)
        found[fits] = np.minimum(found[fits], t[fits])
    return found


def _box(o: Vectors, d: Vectors) -> tuple[np.ndarray, Vectors]:
    enters, leaves = (-np.sign(d) - o) / d, (np.sign(d) - o) / d
    axis = enters.argmax(1)
    t = enters.max(1)
    t[~((t > 0) & (t < leaves.min(1)))] = FAR
    normal = np.zeros_like(o)
    rows = np.arange(len(o))
    normal[rows, axis] = -np.sign(d[rows, axis])
    return t, normal


def _round(o: Vectors, d: Vectors, cone: bool) -> tuple[np.ndarray, Vectors]:
    """Intersects cylinders, and cones with the tip at y = 1, including their flat ends."""
    flat = np.array([1, 0, 1])
    if cone:  # the radius at y is (1 - y) / 2
        k, m = (1 - o[:, 1]) / 2, -d[:, 1] / 2
    else:
        k, m = np.ones(len(o)), np.zeros(len(o))
    across = d * flat
    a = _dot(across, across) - m * m
    b = _dot(o, across) - k * m
    c = _dot(o * flat, o) - k * k
    t = _first(*_roots(a, b, c), o, d, 1)
    point = o + d * np.where(t < FAR, t, 0)[:, None]
    normal = point * flat
    if cone:
        normal[:, 1] = np.sqrt(_dot(normal, normal)) / 2
    for y in (-1,) if cone else (-1, 1):
        lid = (y - o[:, 1]) / d[:, 1]
        point = o + d * lid[:, None]
        fits = (lid > 0) & (lid < t) & (_dot(point * flat, point) <= 1)
        t[fits], normal[fits] = lid[fits], (0, y, 0)
    return t, normal


class _Material:
    """A colour for each point: plain, checks, stripes, dots, rings, noise or marble."""

    def __init__(self, random: np.random.Generator) -> None:
        self.pattern = int(random.integers(7))
        base, other = _colours(random, 2)
        self.colours = base, base + (other - base) * random.uniform(0.1, 1)
        self.scale = np.exp(random.uniform(np.log(1.5), np.log(9)))
        self.turn = _turn(0, random.uniform(0, 6.3)) @ _turn(1, random.uniform(0, 6.3))
        self.turn = self.turn if random.random() < 0.5 else np.eye(3)
        self.salt = int(random.integers(1 << 30))
        self.grain = random.uniform(0, 0.25)

    def __call__(self, points: Vectors) -> Any:
        """points [M, 3] -> RGB [M, 3], linear."""
        p = (points @ self.turn + 31.7) * self.scale
        noise = _noise(p * 2.3, self.salt)
        patterns = (
            lambda: np.zeros(len(p)),
            lambda: _dot(np.floor(p), np.ones(3)) % 2,
            lambda: (p[:, 0] % 2 < 1).astype(float),
            lambda: (_dot(p % 1 - 0.5, p % 1 - 0.5) < 0.18).astype(float),
            lambda: 0.5 + 0.5 * np.sin(np.hypot(p[:, 0], p[:, 2]) * 3 + noise * 2),
            lambda: 0.6 * _noise(p * 0.7, self.salt + 1) + 0.4 * noise,
            lambda: 0.5 + 0.5 * np.sin(p[:, 0] * 2 + 5 * _noise(p, self.salt + 2)),
        )
        share = patterns[self.pattern]()[:, None]
        mixed = self.colours[0] + share * (self.colours[1] - self.colours[0])
        return mixed * (1 + self.grain * (noise[:, None] - 0.5) * 2)


def _colours(random: np.random.Generator, count: int) -> Any:
    """[count, 3]: random colours, most of them dull."""
    grey = random.uniform(0.08, 0.95, (count, 1))
    return grey + random.beta(1, 1.5) * (random.uniform(0.05, 1, (count, 3)) - grey)


def _noise(points: Vectors, salt: int) -> np.ndarray:
    """Value noise [M] in 0 .. 1: random numbers at whole points, blended between them."""
    whole = np.floor(points)
    part = points - whole
    part = part * part * (3 - 2 * part)
    corner = whole.astype(np.int64).astype(np.uint32)
    found = np.zeros(len(points))
    for i in range(8):
        bits = i & 1, i >> 1 & 1, i >> 2
        x, y, z = (n + np.uint32(bit) for n, bit in zip(corner.T, bits, strict=True))
        hashed = (x * np.uint32(374761393)) ^ (y * np.uint32(668265263))
        hashed = hashed ^ (z * np.uint32(2147483647))
        hashed = (hashed ^ np.uint32(salt)) * np.uint32(1274126177)
        hashed = (hashed ^ (hashed >> np.uint32(15))) * np.uint32(2246822519)
        hashed ^= hashed >> np.uint32(13)
        wx, wy, wz = (w if bit else 1 - w for w, bit in zip(part.T, bits, strict=True))
        found += wx * wy * wz * (hashed / 2**32)
    return found


def _sky(random: np.random.Generator, rays: Vectors, wall: _Material) -> Any:
    """The background [M, 3]: a sky with clouds, or a distant wall of some material."""
    if random.random() < 0.4:
        return wall(rays * (1.5, 1.5, 0) * 2)
    low, high = 0.3 + 0.7 * _colours(random, 2)
    share = np.clip(rays[:, 1:2] * 2 + 0.3, 0, 1)
    clouds = _noise(rays * (6, 14, 6), int(random.integers(1 << 30)))[:, None]
    return (low + share * (high - low)) * (1 + random.uniform(0, 0.5) * (clouds - 0.5))


def _photographed(
    random: np.random.Generator, colours: np.ndarray, grain: np.random.Generator
) -> np.ndarray:
    """Linear RGB [H, W, 3] -> uint8: exposure, a slight lens blur, noise, gamma."""
    exposed, blur = colours * random.uniform(0.8, 1.25), random.uniform(0.4, 0.8)
    blurred = gaussian_filter(exposed, (blur, blur, 0))
    shown = np.clip(blurred, 0, 1) ** (1 / random.uniform(1.4, 2.4))
    shown += grain.normal(0, random.uniform(0, 0.03), shown.shape)
    pixels: np.ndarray = np.rint(np.clip(shown, 0, 1) * 255).astype(np.uint8)
    return pixels
