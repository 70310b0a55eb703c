"""Rotations against MuJoCo's own, and their inverses."""

import math

import mujoco
import numpy as np
import pytest
import torch
from torch.func import jacrev, vmap

from rlcore import random, rotations

NUM = 200


def quaternions(seed=0):
    draw = random.normal(random.key(seed), (NUM, 4), torch.float64)
    return draw / draw.norm(dim=-1, keepdim=True)


def vectors(seed=1, scale=1.0):
    return scale * random.normal(random.key(seed), (NUM, 3), torch.float64)


def by_mujoco(function, size, *arrays):
    out = np.zeros((NUM, size))
    for i in range(NUM):
        function(out[i], *(np.ascontiguousarray(a[i].numpy()) for a in arrays))
    return torch.from_numpy(out)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_product_and_conjugate_are_mujocos():
    a, b = quaternions(), quaternions(2)
    close(rotations.multiply(a, b), by_mujoco(mujoco.mju_mulQuat, 4, a, b))
    close(rotations.conjugate(a), by_mujoco(mujoco.mju_negQuat, 4, a))


def test_rotation_of_vectors_is_mujocos():
    q, v = quaternions(), vectors()
    turned = by_mujoco(lambda out, v, q: mujoco.mju_rotVecQuat(out, v, q), 3, v, q)
    close(rotations.rotate(q, v), turned)
    close(rotations.rotate_inverse(q, turned), v)


def test_gravity_is_the_downward_axis_in_the_body_frame():
    q = quaternions()
    down = torch.tensor([0.0, 0.0, -1.0]).double().expand(NUM, 3)
    gravity = rotations.projected_gravity(q)
    close(
        gravity,
        by_mujoco(lambda out, v, q: mujoco.mju_rotVecQuat(out, v, q), 3, down, rotations.conjugate(q)),
    )
    close(gravity.norm(dim=-1), torch.ones(NUM).double())
    upright = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert torch.equal(rotations.projected_gravity(upright), torch.tensor([0.0, 0.0, -1.0]))


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-4, 1e-6, 0.0])
def test_rotation_vector_is_an_axis_and_an_angle(scale):
    r = vectors(scale=scale)
    angle = r.norm(dim=-1)
    axis = r / angle.clamp(min=1e-300)[:, None]
    ours = rotations.from_rotation_vector(r)
    close(ours, by_mujoco(lambda out, a, x: mujoco.mju_axisAngle2Quat(out, x, a[0]), 4, angle, axis))
    close(ours.norm(dim=-1), torch.ones(NUM).double())


def test_yaw_is_the_heading_of_the_x_axis():
    q = quaternions()
    matrix = by_mujoco(mujoco.mju_quat2Mat, 9, q).reshape(NUM, 3, 3)
    close(rotations.yaw(q), torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0]))
    angles = torch.linspace(-math.pi + 1e-6, math.pi - 1e-6, 41).double()
    close(rotations.yaw(rotations.from_yaw(angles)), angles)
    # A turn about the vertical, before which the body leaned, is added to its heading.
    leaning = rotations.from_rotation_vector(vectors(scale=0.1))
    turned = rotations.multiply(rotations.from_yaw(torch.tensor(0.7).double()).expand(NUM, 4), leaning)
    close(rotations.yaw(turned) - rotations.yaw(leaning), torch.full((NUM,), 0.7).double())


def test_inverses_and_unit_length():
    a, b, v = quaternions(), quaternions(2), vectors()
    identity = torch.tensor([1.0, 0.0, 0.0, 0.0]).double().expand(NUM, 4)
    close(rotations.multiply(a, rotations.conjugate(a)), identity)
    close(rotations.multiply(a, b).norm(dim=-1), torch.ones(NUM).double())
    close(rotations.rotate(a, v).norm(dim=-1), v.norm(dim=-1))
    # A product of rotations is one after the other.
    close(rotations.rotate(rotations.multiply(a, b), v), rotations.rotate(a, rotations.rotate(b, v)))
    # q and -q are one rotation.
    close(rotations.rotate(-a, v), rotations.rotate(a, v))


def test_same_bits_alone_and_among_others():
    q, p, v, r = quaternions(), quaternions(2), vectors(), vectors(3, 1e-4)
    for function, args in (
        (rotations.multiply, (q, p)),
        (rotations.rotate, (q, v)),
        (rotations.projected_gravity, (q,)),
        (rotations.from_rotation_vector, (r,)),
        (rotations.yaw, (q,)),
        (rotations.from_yaw, (v[:, 0],)),
    ):
        every = function(*args)
        assert torch.equal(every, vmap(function)(*args))
        for i in range(0, NUM, 17):
            assert torch.equal(every[i], function(*(x[i] for x in args)))


def test_gradients_are_finite_at_the_identity():
    identity = torch.tensor([1.0, 0.0, 0.0, 0.0]).double()
    # The derivative of (cos(|r|/2), sin(|r|/2) r / |r|) at zero is (0, 1/2).
    slope = jacrev(rotations.from_rotation_vector)(torch.zeros(3).double())
    close(slope, torch.cat([torch.zeros(1, 3), 0.5 * torch.eye(3)]).double())
    # d yaw / d z at the identity: yaw = 2 atan(z / w).
    close(jacrev(rotations.yaw)(identity), torch.tensor([0.0, 0.0, 0.0, 2.0]).double())
    gravity = jacrev(rotations.projected_gravity)(identity)
    assert torch.isfinite(gravity).all()
    # Across the change from the series to the formula the derivative has no jump.
    below, above = (
        jacrev(rotations.from_rotation_vector)(torch.tensor([s, 0.0, 0.0]).double()) for s in (0.99e-4, 1.01e-4)
    )
    torch.testing.assert_close(below, above, rtol=0, atol=2e-6)


def test_heading_is_a_unit_vector_with_finite_slope():
    quaternion = random.normal(random.key(3), (64, 4), dtype=torch.float64)
    quaternion = quaternion / quaternion.norm(dim=1, keepdim=True)
    ahead = rotations.heading(quaternion)
    angle = rotations.yaw(quaternion)
    torch.testing.assert_close(ahead, torch.stack([torch.cos(angle), torch.sin(angle)], dim=1), rtol=0, atol=1e-12)
    # Nose down, nose up, upright and upside down.
    half = math.sqrt(0.5)
    for q in ([half, 0, half, 0], [half, 0, -half, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]):
        value = torch.tensor(q, dtype=torch.float64)
        slope = torch.func.jacrev(rotations.heading)(value)
        assert torch.isfinite(slope).all(), q
        assert float(rotations.heading(value).norm()) == pytest.approx(1.0, abs=1e-12)


def test_a_heading_frame_turns_about_the_vertical_only():
    quaternion = rotations.multiply(
        rotations.from_yaw(torch.tensor(math.pi / 2).double()),
        rotations.from_rotation_vector(torch.tensor([0.5, 0.3, 0.0]).double()),
    )
    straight = rotations.from_yaw(rotations.yaw(quaternion))
    v = torch.tensor([1.0, -2.0, 3.0]).double()
    expected = rotations.rotate_inverse(straight, v)
    torch.testing.assert_close(rotations.to_heading(rotations.heading(quaternion), v), expected, rtol=0, atol=1e-12)
