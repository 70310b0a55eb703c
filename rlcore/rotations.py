"""Quaternions and frames.

Quaternions are `[..., 4]` in the order w x y z and of unit length; q turns a vector of the body frame into
the world frame. Formulas are written out by component: they give the same bits for one robot as for
thousands.
"""

import torch
from torch import Tensor


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Hamilton product `a b`: first b, then a. `[..., 4]`, `[..., 4]` to `[..., 4]`."""
    aw, ax, ay, az = a.unbind(-1)
    bw, bx, by, bz = b.unbind(-1)
    return torch.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        dim=-1,
    )


def conjugate(q: Tensor) -> Tensor:
    """The opposite rotation, `[..., 4]`."""
    w, x, y, z = q.unbind(-1)
    return torch.stack([w, -x, -y, -z], dim=-1)


def rotate(q: Tensor, v: Tensor) -> Tensor:
    """`v` `[..., 3]` in the body frame, seen in the world frame: `v + 2 w (u x v) + 2 u x (u x v)`, q = (w, u)."""
    w, x, y, z = q.unbind(-1)
    return _rotate(w, x, y, z, v)


def rotate_inverse(q: Tensor, v: Tensor) -> Tensor:
    """`v` `[..., 3]` in the world frame, seen in the body frame."""
    w, x, y, z = q.unbind(-1)
    return _rotate(-w, x, y, z, v)  # -q and q are one rotation, so this is the conjugate


def _rotate(w: Tensor, x: Tensor, y: Tensor, z: Tensor, v: Tensor) -> Tensor:
    a, b, c = v.unbind(-1)
    # t = 2 u x v
    tx, ty, tz = 2 * (y * c - z * b), 2 * (z * a - x * c), 2 * (x * b - y * a)
    return torch.stack(
        [a + w * tx + y * tz - z * ty, b + w * ty + z * tx - x * tz, c + w * tz + x * ty - y * tx], dim=-1
    )


def projected_gravity(q: Tensor) -> Tensor:
    """The direction of gravity in the body frame, a unit vector `[..., 3]`; (0, 0, -1) when upright."""
    w, x, y, z = q.unbind(-1)
    return torch.stack([2 * (w * y - x * z), -2 * (w * x + y * z), 2 * (x * x + y * y) - 1], dim=-1)


def from_yaw(yaw: Tensor) -> Tensor:
    """A rotation by `yaw` (rad) about the world's vertical axis, `[...]` to `[..., 4]`."""
    zero = torch.zeros_like(yaw)
    return torch.stack([torch.cos(yaw / 2), zero, zero, torch.sin(yaw / 2)], dim=-1)


def yaw(q: Tensor) -> Tensor:
    """Heading in rad, in [-pi, pi]: the angle of the body's x axis in the ground plane.

    `[..., 4]` to `[...]`. It means nothing, and has no gradient, where that axis is vertical.
    """
    w, x, y, z = q.unbind(-1)
    return torch.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))


def heading(q: Tensor) -> Tensor:
    """The body's x axis in the ground plane, a unit vector `[..., 2]` of the world frame: cosine and sine of `yaw`.

    Where that axis is vertical within 1e-6 rad it is (1, 0), so that its gradient is finite everywhere.
    """
    w, x, y, z = q.unbind(-1)
    east, north = 1 - 2 * (y * y + z * z), 2 * (w * z + x * y)
    square = east * east + north * north
    vertical = square < 1e-12
    length = torch.sqrt(torch.where(vertical, 1.0, square))
    return torch.stack([torch.where(vertical, 1.0, east) / length, torch.where(vertical, 0.0, north) / length], dim=-1)


def to_heading(direction: Tensor, v: Tensor) -> Tensor:
    """`v` `[..., 3]` in the world frame, seen in the frame of a `heading` `[..., 2]`: turned about the vertical."""
    c, s = direction.unbind(-1)
    x, y, z = v.unbind(-1)
    return torch.stack([c * x + s * y, c * y - s * x, z], dim=-1)


def from_rotation_vector(r: Tensor) -> Tensor:
    """The rotation about `r` by `|r|` rad, `[..., 3]` to `[..., 4]`; smooth at zero."""
    square = (r * r).sum(-1, keepdim=True)
    small = square < 1e-8
    angle = torch.sqrt(torch.where(small, torch.ones_like(square), square))
    # sin(a/2)/a, by its series where a is small; both branches stay finite for gradients.
    factor = torch.where(small, 0.5 - square / 48, torch.sin(angle / 2) / angle)
    scalar = torch.where(small, 1 - square / 8, torch.cos(angle / 2))
    return torch.cat([scalar, factor * r], dim=-1)
