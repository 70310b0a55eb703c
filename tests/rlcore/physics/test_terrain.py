"""Uneven ground: what `Terrain` tells is what MuJoCo's own rays and contacts meet, and equal keys make equal ground."""

import dataclasses

import mujoco
import numpy as np
import pytest
import torch

from rlcore import random
from rlcore.errors import InputError
from rlcore.jit import jit
from rlcore.physics.mujoco import load_model, load_spec
from rlcore.physics.terrain import KINDS, TerrainConfig, add_terrain
from tasks.humanoid.body import MODEL

FLOOR = """
<mujoco>
  <worldbody>
    <geom name="floor" type="plane" size="0 0 1" pos="1 -2 0.3" friction="0.7" condim="4" priority="2"/>
    <body name="ball" pos="1 -2 1"><freejoint/><geom size="0.05"/></body>
  </worldbody>
</mujoco>
"""
SMALL = TerrainConfig(kinds=KINDS, levels=3, patch_size=3.0, platform=1.0, border=1.0, step_depth=0.2)


def grounded(config=SMALL, seed=0, source=FLOOR):
    spec = mujoco.MjSpec.from_string(source)
    terrain = add_terrain(spec, config, random.key(seed))
    return terrain, spec.compile()


@pytest.fixture(scope="module")
def small():
    return grounded()


def points(terrain, num, seed=0):
    """Points anywhere on the ground, but for a millimetre at the edges."""
    rows, columns = terrain.heights.shape
    share = random.uniform(random.key(seed), (2, num), dtype=torch.float64)
    size = torch.tensor([[columns - 1], [rows - 1]]) * terrain.resolution - 0.002
    return torch.tensor(terrain.corner).unsqueeze(1).double() + 0.001 + share * size


def ray_heights(model, x, y):
    """Where rays straight down from 10 m meet the geom "floor"."""
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    down, met = np.array([0.0, 0.0, -1.0]), np.zeros(1, np.int32)
    ball = model.body("ball").id if model.nbody > 1 else -1
    heights = []
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        heights.append(10.0 - mujoco.mj_ray(model, data, np.array([a, b, 10.0]), down, None, 1, ball, met, None))
        assert met[0] == model.geom("floor").id
    return torch.tensor(heights, dtype=torch.float64)


# --- Where the ground is ---


def test_height_is_where_rays_meet_the_ground(small):
    terrain, model = small
    x, y = points(terrain, 400)
    told = terrain.height(x, y)
    torch.testing.assert_close(told, ray_heights(model, x, y), rtol=0, atol=1e-6)
    # The points met hills and pits: pyramids of 40 % over 1 m, and 5 steps of 15 cm.
    assert told.max() - 0.3 > 0.3 and told.min() - 0.3 < -0.3


def test_height_of_the_default_ground():
    terrain, model = grounded(TerrainConfig())
    x, y = points(terrain, 100)
    torch.testing.assert_close(terrain.height(x, y), ray_heights(model, x, y), rtol=0, atol=1e-6)


def test_height_goes_on_beyond_the_edge_and_takes_no_numbers(small):
    terrain, _ = small
    (left, front), inf, nan = terrain.corner, torch.inf, torch.nan
    x, y = torch.tensor([left - 5.0, -inf, inf, 1e9, nan]), torch.tensor([front - 5.0, inf, -inf, 1e9, 0.0])
    heights = terrain.height(x.double(), y.double())
    # The border is level, at the plane's height.
    assert torch.allclose(heights[:4], torch.full((4,), 0.3).double(), atol=1e-7)


def test_height_of_one_robot_equals_that_of_many(small):
    terrain, _ = small
    x, y = (p.reshape(50, 4) for p in points(terrain, 200))
    whole = terrain.height(x, y)
    assert torch.equal(whole, torch.func.vmap(terrain.height)(x, y))
    assert torch.equal(whole, jit(torch.func.vmap(terrain.height))(x, y))
    assert torch.equal(whole, torch.stack([terrain.height(a, b) for a, b in zip(x, y, strict=True)]))


def test_slope_of_the_height_is_the_slope_of_the_ground():
    config = dataclasses.replace(SMALL, kinds=("slope",), levels=1, slope=0.25)
    terrain, _ = grounded(config)
    # The patch's middle is at x = 1; from its edge at -0.5 the ground rises for 1 m to the platform.
    slope = torch.func.grad(terrain.height)(torch.tensor(0.0).double(), torch.tensor(-2.03).double())
    assert float(slope) == pytest.approx(0.25, abs=1e-6)


def test_shapes_by_hand():
    config = dataclasses.replace(SMALL, levels=2)
    terrain, _ = grounded(config)
    assert terrain.kinds == KINDS and terrain.origins.shape == (2, 6, 3)
    x0, y0, z0 = 1.0, -2.0, 0.3  # the plane's own origin is the middle of the first patch

    def height(kind, level, dx, dy=0.0):
        at = torch.tensor([x0 + 3 * level + dx, y0 + 3 * KINDS.index(kind) + dy]).double()
        return float(terrain.height(at[0], at[1])) - z0

    for level, share in ((0, 0.5), (1, 1.0)):
        # 1 m from the edge to the platform at a slope of 0.4, or in five steps of 0.2 m.
        for kind, middle in (("flat", 0.0), ("slope", 0.4), ("slope_pit", -0.4), ("steps", 0.75), ("steps_pit", -0.75)):
            expected = torch.tensor([x0 + 3 * level, y0 + 3 * KINDS.index(kind), z0 + share * middle]).double()
            assert torch.allclose(terrain.origin(level, KINDS.index(kind)), expected, atol=1e-6), kind
            # The platform is level, half a metre around its middle.
            assert height(kind, level, 0.49, -0.49) == pytest.approx(share * middle, abs=1e-6)
            assert height(kind, level, 1.5) == pytest.approx(0.0, abs=1e-6)
        assert height("slope", level, -1.0) == pytest.approx(share * 0.2, abs=1e-6)
        # Half a metre inside the edge two steps have been taken.
        assert height("steps", level, 0.0, 1.0) == pytest.approx(share * 0.3, abs=1e-6)
        rough = torch.tensor([height("rough", level, d, 1.0) for d in np.arange(-1.4, 1.45, 0.1)])
        assert rough.abs().max() <= share * 0.04 + 1e-6 and len(rough.unique()) > 20
        # Uniform on +-0.04 m: deviation 0.04 / sqrt(3) = 0.023.
        assert float(rough.std()) == pytest.approx(share * 0.023, rel=0.4)
        assert height("rough", level, 0.0) == pytest.approx(0.0, abs=1e-6)


def test_origins_by_tensors(small):
    terrain, _ = small
    levels, columns = torch.tensor([0, 2, 7, -1]), torch.tensor([5, 0, 1, 1])
    expected = torch.stack([terrain.origins[a, b] for a, b in ((0, 5), (2, 0), (2, 1), (0, 1))])
    assert torch.equal(terrain.origin(levels, columns), expected)
    assert torch.equal(torch.func.vmap(terrain.origin)(levels, columns), expected)
    assert torch.equal(torch.func.vmap(lambda level: terrain.origin(level, 1))(levels)[2], expected[2])
    assert torch.equal(terrain.height(expected[:, 0], expected[:, 1]), expected[:, 2])


# --- What it does to a model ---


def test_the_plane_gives_the_ground_its_contacts_and_a_ball_rests_on_it(small):
    terrain, model = small
    floor = model.geom("floor")
    assert floor.type == mujoco.mjtGeom.mjGEOM_HFIELD and model.ngeom == 2
    assert floor.friction[0] == 0.7 and floor.condim == 4 and floor.priority == 2
    data = mujoco.MjData(model)
    for kind in ("steps", "slope_pit"):
        x, y, z = terrain.origin(2, KINDS.index(kind)).tolist()
        data.qpos[:3], data.qvel[:] = (x, y, z + 0.06), 0.0
        mujoco.mj_step(model, data, 1000)
        np.testing.assert_allclose(data.qpos[:3], (x, y, z + 0.05), atol=2e-3)


def test_flat_ground_is_the_plane():
    terrain, model = grounded(dataclasses.replace(SMALL, kinds=("flat",), levels=1))
    assert (terrain.heights == 0.3).all()
    x, y = points(terrain, 20)
    torch.testing.assert_close(ray_heights(model, x, y), torch.full((20,), 0.3).double(), rtol=0, atol=1e-6)


def test_equal_keys_make_equal_ground():
    (a, model_a), (b, model_b), (c, _) = grounded(), grounded(), grounded(seed=1)
    assert torch.equal(a.heights, b.heights) and np.array_equal(model_a.hfield_data, model_b.hfield_data)
    assert not torch.equal(a.heights, c.heights)
    # Patches of one kind differ, and another level's figure leaves a patch what it was.
    rough = dataclasses.replace(SMALL, kinds=("rough", "rough"), levels=2)
    heights = grounded(rough)[0].heights[10:-10, 10:-10]
    patches = [heights[:31, :31] * 2, heights[:31, 30:], heights[30:, :31] * 2, heights[30:, 30:]]
    assert len({round(float(p.std()), 9) for p in patches}) == 4


def test_the_humanoid_gets_ground():
    spec = load_spec(MODEL)
    terrain = add_terrain(spec, SMALL, random.key(0))
    model, plain = spec.compile(), load_model(MODEL)
    assert (model.nq, model.ngeom, model.geom("floor").id) == (plain.nq, plain.ngeom, plain.geom("floor").id)
    x, y = points(terrain, 20)
    assert terrain.height(x, y).std() > 0.05


# --- Mistakes ---


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kinds": ()}, r"kinds must be some of flat, .* got \(\) \(--terrain.kinds\)"),
        ({"kinds": ("flat", "lava")}, "kinds must be some of flat, .*'lava'"),
        ({"levels": 0}, "levels must be at least 1, got 0"),
        ({"resolution": 0.0}, "resolution must be more than 0, got 0.0"),
        ({"patch_size": 8.05}, "patch_size must be a multiple of resolution = 0.1.* got 8.05"),
        ({"patch_size": float("nan")}, "patch_size must be a multiple"),
        ({"step_depth": 0.25}, r"step_depth must be a multiple .* \(--terrain.step-depth\)"),
        ({"step_depth": 0.0}, "step_depth must be .* at least 1 times"),
        ({"border": -1.0}, "border must be .* got -1.0"),
        ({"platform": 8.0}, "platform must be less than patch_size = 8.0, got 8.0"),
        ({"roughness": -0.1}, "roughness must be 0 or more"),
        ({"slope": float("inf")}, "slope must be 0 or more, got inf"),
        ({"step_height": -0.1}, "step_height must be 0 or more"),
    ],
)
def test_config_mistakes_are_told_in_one_line(changes, words):
    with pytest.raises(InputError, match=words) as caught:
        TerrainConfig(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (FLOOR.replace('name="floor"', 'name="ground"'), "got 'floor'; there are: ground"),
        (FLOOR.replace('type="plane" size="0 0 1"', 'type="box" size="1 1 1"'), "got 'floor'; there are: none"),
        (FLOOR.replace('pos="1 -2 0.3"', 'quat="1 0.1 0 0"'), "'floor' is turned"),
        (FLOOR.replace('pos="1 -2 0.3"', 'euler="10 0 0"'), "'floor' is turned"),
    ],
)
def test_models_without_a_level_plane_are_refused(source, words):
    with pytest.raises(InputError, match=words):
        add_terrain(mujoco.MjSpec.from_string(source), SMALL, random.key(0))


def test_a_second_terrain_is_refused():
    spec = mujoco.MjSpec.from_string(FLOOR.replace("<body", '<geom name="other" type="plane" size="0 0 1"/><body'))
    add_terrain(spec, SMALL, random.key(0))
    with pytest.raises(InputError, match="height field 'terrain' already"):
        add_terrain(spec, SMALL, random.key(0), "other")
    with pytest.raises(InputError, match="does not exist"):
        load_spec("nowhere.xml")
