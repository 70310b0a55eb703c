"""Sensors computed from Isaac Gym's tensors, against MuJoCo's own."""

import mujoco
import numpy as np
import pytest
import torch

from rlcore.errors import InputError
from rlcore.physics import isaacgym_model as layout
from rlcore.physics import isaacgym_sensors as sensing
from tests.rlcore.physics.test_isaacgym_model import arm, edited, humanoid, noise, random_data, task_model


@pytest.mark.parametrize(("name", "sensor"), [("ant", "front_left_foot_force"), ("humanoid_run", "left_foot_force")])
def test_tasks_that_have_none_are_refused_by_the_sensor(name, sensor):
    with pytest.raises(InputError, match=f"sensor '{sensor}' is of type force"):
        sensing.sensors_of(task_model(name))


@pytest.mark.parametrize(
    ("kind", "xml"),
    [
        ("force", '<force name="probe" site="tip"/>'),
        ("rangefinder", '<rangefinder name="probe" site="tip"/>'),
        ("accelerometer", '<accelerometer name="probe" site="tip"/>'),
    ],
)
def test_sensors_that_the_tensors_do_not_tell_are_refused_by_name(kind, xml):
    model = arm(
        edited("<sensor>", "<sensor>" + xml).replace('<body name="hand"', '<site name="tip"/><body name="hand"')
    )
    with pytest.raises(InputError, match=f"(?s){kind}.*'probe'|'probe'.*{kind}"):
        sensing.sensors_of(model)


def tensors_of(model, data, ids, of_com):
    """What Isaac Gym's tensors hold of these bodies in MuJoCo's state, by MuJoCo's own functions."""
    rows, forces, velocity, force = np.zeros((1, len(ids), 13)), np.zeros((1, len(ids), 3)), np.zeros(6), np.zeros(6)
    for i, b in enumerate(ids):
        kind = mujoco.mjtObj.mjOBJ_BODY if of_com else mujoco.mjtObj.mjOBJ_XBODY
        mujoco.mj_objectVelocity(model, data, kind, b, velocity, 0)
        rows[0, i] = [*data.xpos[b], *data.xquat[b][1:], data.xquat[b][0], *velocity[3:], *velocity[:3]]
    for c in range(data.ncon):
        mujoco.mj_contactForce(model, data, c, force)
        contact = data.contact[c]
        for geom, sign in ((contact.geom1, -1), (contact.geom2, 1)):
            if model.geom_bodyid[geom] in ids:
                forces[0, ids.index(model.geom_bodyid[geom])] += sign * contact.frame.reshape(3, 3).T @ force[:3]
    return torch.tensor(rows), torch.tensor(forces)


@pytest.mark.parametrize("of_com", [True, False])
@pytest.mark.parametrize("make", [humanoid, arm])
def test_sensors_are_mujocos(make, of_com):
    model = make()
    sensors, table = sensing.sensors_of(model), layout.actuator_table(model)
    ids = sensing.watched(model, sensors)
    touched = 0
    for seed in range(6):
        data = random_data(model, seed)
        if model.nkey:  # standing, with its feet in the floor a little
            data.qpos[:] = model.key("stand").qpos + 0.01 * noise(model.nq, seed=seed).numpy()
            data.qpos[2] -= 0.01
            data.qpos[3:7] /= np.linalg.norm(data.qpos[3:7])
        data.ctrl[:] = noise(model.nu, seed=seed)
        mujoco.mj_forward(model, data)
        body, contact = tensors_of(model, data, ids, of_com)
        com = torch.tensor(model.body_ipos[list(ids)]) if of_com else None
        bodies = sensing.bodies_from_tensors(ids, body, contact, com)
        row = lambda x: torch.tensor(np.array(x))[None]  # noqa: E731
        limits = np.where(model.actuator_forcelimited[:, None], model.actuator_forcerange, [-np.inf, np.inf])
        gain, kv = torch.tensor(model.actuator_gainprm[:, 0]), torch.tensor(-model.actuator_biasprm[:, 2])
        low, high = (torch.tensor(limits[:, k]) for k in (0, 1))
        force = layout.actuator_force(table, row(data.ctrl), row(data.qpos), row(data.qvel), gain, kv, low, high)
        before = row(data.qvel - 0.004 * data.qacc)  # the mean acceleration of such a step is MuJoCo's
        motion = sensing.Motion(
            row(data.qpos), row(data.qvel), row(data.qpos), before, 0.004, torch.tensor(model.opt.gravity), force,
            row(data.qfrc_actuator), torch.tensor(model.body_mass), torch.tensor(model.body_inertia),
        )  # fmt: skip
        values = sensing.sensor_values(model, sensors, bodies, motion)
        assert values.shape == (1, model.nsensordata)
        for sensor in sensors:
            actual, expected = values[0, sensor.place].numpy(), data.sensordata[sensor.place]
            np.testing.assert_allclose(actual, expected, atol=1e-8, err_msg=sensor.name)
            touched += sensor.kind == "TOUCH" and expected[0] > 1.0
    assert touched > 4 or make is arm
