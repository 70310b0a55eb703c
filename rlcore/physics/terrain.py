"""Uneven ground for MuJoCo: one height field of patches that grow harder along x, another kind in each column along y.

`add_terrain` puts the ground into a model before it is compiled and tells where it is: `Terrain.origin` is where a
robot begins in a patch, `Terrain.height` how high the ground is under a point, as pure functions of tensors. The
ground is the same for all robots; where one stands on it is its difficulty. What moves a robot to another level is
the task's business, not done here.
"""

import dataclasses
import math
from dataclasses import dataclass

import mujoco
import numpy as np
import torch
from torch import Tensor

from rlcore import random
from rlcore.errors import InputError

KINDS = ("flat", "rough", "slope", "slope_pit", "steps", "steps_pit")

_ASSET = "terrain"
_BASE = 1.0  # m of solid ground below the lowest point


@dataclass(frozen=True)
class TerrainConfig:
    """A grid of patches. A figure of difficulty is that of the hardest level; level i of n has (i + 1) / n of it."""

    kinds: tuple[str, ...] = ("flat", "rough", "slope", "steps")
    """A column of patches for each: flat, rough (random heights), slope or steps (a pyramid: robots begin on top),
    slope_pit or steps_pit (robots begin at the bottom)."""
    levels: int = 8
    """Patches in a column, from easy to hard."""
    patch_size: float = 8.0
    """Side of a patch, m."""
    resolution: float = 0.1
    """Distance between points of known height, m; a step's edge is that wide."""
    platform: float = 2.0
    """Side of the level square in the middle of a patch, where robots begin, m."""
    border: float = 4.0
    """Level ground around all patches, m; beyond it there is none."""
    roughness: float = 0.04
    """Largest height or depth of rough ground, m."""
    slope: float = 0.4
    """Rise of a slope over its length."""
    step_height: float = 0.15
    """Height of a step, m."""
    step_depth: float = 0.4
    """Length of a step, m."""

    def __post_init__(self) -> None:
        _check(self, "kinds", len(self.kinds) > 0 and set(self.kinds) <= set(KINDS), f"some of {', '.join(KINDS)}")
        _check(self, "levels", self.levels >= 1, "at least 1")
        _check(self, "resolution", 0 < self.resolution < math.inf, "more than 0")
        for name in ("roughness", "slope", "step_height"):
            _check(self, name, 0 <= getattr(self, name) < math.inf, "0 or more")
        whole = f"a multiple of resolution = {self.resolution}"
        for name, least in (("patch_size", 2), ("step_depth", 1), ("border", 0)):
            cells = getattr(self, name) / self.resolution
            near = math.isfinite(cells) and abs(cells - round(cells)) < 1e-6
            _check(self, name, near and round(cells) >= least, f"{whole}, at least {least} times it")
        _check(self, "platform", 0 <= self.platform < self.patch_size, f"less than patch_size = {self.patch_size}")


def _check(config: TerrainConfig, name: str, valid: bool, what: str) -> None:
    if not valid:
        flag = "--terrain." + name.replace("_", "-")
        raise InputError(f"{name} must be {what}, got {getattr(config, name)!r} ({flag})")


@dataclass(frozen=True, eq=False)
class Terrain:
    """Where the ground is. World frame, m.

    Attributes:
      kinds: what each column holds.
      heights: `[rows, columns]` float64, height of the grid's points; y grows along rows, x along columns.
      corner: x and y of the first point.
      resolution: distance between points.
      origins: `[levels, kinds, 3]` float64, the middle of each patch, on the ground.
    """

    kinds: tuple[str, ...]
    heights: Tensor
    corner: tuple[float, float]
    resolution: float
    origins: Tensor

    def origin(self, level: int | Tensor, column: int | Tensor) -> Tensor:
        """The middle of a patch, on the ground: `[3]` for numbers, `[..., 3]` for integer tensors `[...]`.

        Levels and columns beyond the last are the last.
        """
        levels, columns = self.origins.shape[:2]
        level, column = (torch.as_tensor(i, device=self.origins.device) for i in (level, column))
        place = level.clamp(0, levels - 1) * columns + column.clamp(0, columns - 1)
        return self.origins.reshape(-1, 3)[place]

    def height(self, x: Tensor, y: Tensor) -> Tensor:
        """Height of the ground under points `x`, `y` `[...]`: that of the triangles which robots stand on.

        A cell of the grid is two triangles that meet in the diagonal from its lowest x and y to its highest. Beyond
        the edge of the ground its height goes on as it is there.
        """
        rows, columns = self.heights.shape
        u = torch.clamp((x.to(torch.float64) - self.corner[0]) * (1 / self.resolution), 0.0, columns - 1.0)
        v = torch.clamp((y.to(torch.float64) - self.corner[1]) * (1 / self.resolution), 0.0, rows - 1.0)
        # Clamped once more as integers: a position that is not a number is somewhere too.
        column, row = torch.clamp(u.to(torch.int64), 0, columns - 2), torch.clamp(v.to(torch.int64), 0, rows - 2)
        first = row * columns + column
        corners = self.heights.reshape(-1)[torch.stack([first, first + 1, first + columns, first + columns + 1])]
        here, along_x, along_y, across = corners.unbind(0)
        u, v = u - column, v - row
        below = u >= v
        rise_x = torch.where(below, along_x - here, across - along_y)
        rise_y = torch.where(below, across - along_x, along_y - here)
        return here + u * rise_x + v * rise_y


def add_terrain(spec: mujoco.MjSpec, config: TerrainConfig, key: Tensor, floor: str = "floor") -> Terrain:
    """Turn the plane `floor` of a model into uneven ground; its contact properties and material stay.

    The middle of the easiest patch of the first column is where the plane's own origin was.

    Args:
      spec: the model, which is changed; compile it afterwards.
      config: what the ground is like.
      key: of the random heights: equal keys make equal ground.
      floor: the geom to turn into ground, a level plane of the world.

    Raises:
      InputError: if the model has no such plane, or has a terrain already.
    """
    geom = spec.geom(floor)
    if geom is None or geom.type != mujoco.mjtGeom.mjGEOM_PLANE or geom.parent != spec.worldbody:
        planes = [g.name for g in spec.worldbody.geoms if g.type == mujoco.mjtGeom.mjGEOM_PLANE]
        raise InputError(f"terrain needs a plane of the world, got {floor!r}; there are: {', '.join(planes) or 'none'}")
    if geom.alt.type != mujoco.mjtOrientation.mjORIENTATION_QUAT or not np.array_equal(geom.quat, [1, 0, 0, 0]):
        raise InputError(f"terrain needs a level plane, but {floor!r} is turned")
    if any(asset.name == _ASSET for asset in spec.hfields):
        raise InputError(f"the model has a height field {_ASSET!r} already")
    heights = _heights(config, key)
    low, span = float(heights.min()), float(np.ptp(heights))
    # MuJoCo keeps heights as float32 shares of the highest; the table says what these come to.
    share = ((heights - low) / (span or 1.0)).astype(np.float32)
    rows, columns = heights.shape
    half_x, half_y = (columns - 1) * config.resolution / 2, (rows - 1) * config.resolution / 2
    size = [half_x, half_y, span or 1.0, _BASE]
    spec.add_hfield(name=_ASSET, nrow=rows, ncol=columns, size=size, userdata=share.reshape(-1))
    x, y, z = (float(p) for p in geom.pos)
    reach = config.border + config.patch_size / 2
    corner = x - reach, y - reach
    geom.type, geom.hfieldname = mujoco.mjtGeom.mjGEOM_HFIELD, _ASSET
    geom.pos = [corner[0] + half_x, corner[1] + half_y, z + low]
    table = torch.from_numpy(z + low + share.astype(np.float64) * (span or 1.0))
    terrain = Terrain(config.kinds, table, corner, config.resolution, torch.zeros(0))
    middle_x = x + config.patch_size * torch.arange(config.levels, dtype=torch.float64)
    middle_y = y + config.patch_size * torch.arange(len(config.kinds), dtype=torch.float64)
    at_x, at_y = torch.meshgrid(middle_x, middle_y, indexing="ij")
    return dataclasses.replace(terrain, origins=torch.stack([at_x, at_y, terrain.height(at_x, at_y)], dim=-1))


def _heights(config: TerrainConfig, key: Tensor) -> np.ndarray:
    """Heights of all points of the grid, `[rows, columns]`; every patch has height 0 at its edge, as its neighbours."""
    cells, edge = round(config.patch_size / config.resolution), round(config.border / config.resolution)
    inward = np.minimum(np.arange(cells + 1), cells - np.arange(cells + 1))
    inward = np.minimum.outer(inward, inward)  # cells from the nearest edge
    to_platform = (cells - round(config.platform / config.resolution)) // 2
    ring = (inward > 0) & (inward < to_platform)
    inward = np.minimum(inward, to_platform)
    slope = config.slope * config.resolution * inward
    steps = config.step_height * (inward // round(config.step_depth / config.resolution))
    shapes = {"slope": slope, "slope_pit": -slope, "steps": steps, "steps_pit": -steps, "flat": 0.0 * slope}
    heights = np.zeros((len(config.kinds) * cells + 2 * edge + 1, config.levels * cells + 2 * edge + 1))
    for column, kind in enumerate(config.kinds):
        for level in range(config.levels):
            if kind == "rough":
                patch_key = random.fold_in(key, column * config.levels + level)
                noise = random.uniform(patch_key, (cells + 1, cells + 1), -1.0, 1.0, dtype=torch.float64)
                shape = config.roughness * ring * noise.numpy()
            else:
                shape = shapes[kind]
            y, x = edge + column * cells, edge + level * cells
            heights[y : y + cells + 1, x : x + cells + 1] += (level + 1) / config.levels * shape
    return heights
