"""Kinds of measurements: what they are called, how they are averaged, and shapes that are refused."""

import math

import pytest
import torch
from torch.func import vmap

from rlcore import tree
from rlcore.errors import InputError
from rlcore.measurement import Parts, Ratio, check_metrics, scalars


def number(x=0.0):
    return torch.tensor(x, dtype=torch.float64)


def step(power, distance, knee, hip):
    return {
        "height": number(0.8),
        "torque": Parts(torch.stack([number(knee), number(hip)]), ("knee", "hip")),
        "cost": Ratio(number(power), number(distance)),
    }


def test_each_number_has_its_own_name():
    named = scalars(step(6.0, 3.0, 1.0, -2.0))
    assert {name: float(value) for name, value in named.items()} == {
        "height": 0.8,
        "torque/knee": 1.0,
        "torque/hip": -2.0,
        "cost": 2.0,
    }


def test_a_ratio_is_that_of_means():
    steps = tree.stack([step(8.0, 1.0, 1.0, 0.0), step(0.0, 0.0, 2.0, 0.0), step(24.0, 3.0, 6.0, 0.0)])
    means = scalars(tree.map_leaves(lambda x: x.mean(0), steps))
    # 32 J over 4 m; the mean of quotients has none, as the step between says nothing.
    assert float(means["cost"]) == 8.0 and float(means["torque/knee"]) == 3.0
    each = scalars(steps)["cost"].tolist()
    assert each[0] == each[2] == 8.0 and math.isnan(each[1])


def test_they_pass_through_transforms():
    def measured(x):
        return {"a": Parts(torch.stack([x, 2 * x]), ("one", "two")), "b": Ratio(x, x + 1)}

    x = torch.arange(4.0)
    named = scalars(vmap(measured)(x))
    assert torch.equal(named["a/two"], 2 * x) and torch.equal(named["b"], x / (x + 1))
    with pytest.raises(ValueError, match="mismatch"):
        tree.map_leaves(torch.add, measured(x[0]), {"a": Parts(x[:2], ("one", "three")), "b": Ratio(x[0], x[0])})


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"speed": torch.zeros(1)}, r"'speed' must be one number \[\], got shape \[1\]"),
        ({"cost": Ratio(number(), torch.zeros(2))}, r"'cost' must be one number \[\], got shape \[2\]"),
        ({"torque": Parts(torch.zeros(3), ("knee", "hip"))}, r"'torque' must be \[2\] for knee, hip, got shape \[3\]"),
        ({"torque": Parts(torch.zeros(2), ("knee", "knee"))}, "different names, got 'torque/knee' twice"),
        ({"torque": Parts(torch.zeros(1), ("knee",)), "torque/knee": number()}, "got 'torque/knee' twice"),
    ],
)
def test_shapes_and_names_that_cannot_be_logged_are_refused(metrics, words):
    with pytest.raises(InputError, match=words):
        check_metrics(metrics)
    check_metrics(step(1.0, 1.0, 1.0, 1.0))
