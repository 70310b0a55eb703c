"""Sensors computed from Isaac Gym's tensors, against MuJoCo's own."""

import mujoco
import numpy as np
import pytest
import torch

from rlcore.errors import InputError
from rlcore.physics import isaacgym_model as layout
from rlcore.physics import isaacgym_sensors as sensing
from tests.rlcore.physics.test_isaacgym_model import ant, arm, edited, humanoid, noise, random_data, task_model

# A substep short enough that the differences of velocities are accelerations to about 1e-6 of them.
SUBSTEP = 1e-6

# A root that moves freely, a thigh with a tilted inertia, a foot with one ball, and an arm that nothing touches; sites
# are turned and off the origin, so that none of a sensor's frames is the body's.
RIG = """
<mujoco>
  <compiler angle="radian"/>
  <option><flag eulerdamp="disable"/></option>
  <worldbody>
    <geom name="floor" type="plane" size="0 0 1"/>
    <body name="torso" pos="0 0 1">
      <freejoint/>
      <inertial pos="0.02 0.01 0.05" quat="0.9 0.1 0.3 0.2" mass="6" diaginertia="0.1 0.2 0.25"/>
      <site name="torso" pos="0.1 0.05 0.2" quat="0.8 0.4 0.2 0.1"/>
      <body name="thigh" pos="0.1 0.1 0" quat="0.9 0.2 0.1 0">
        <joint name="hip" axis="0 1 0" damping="0.4" armature="0.02"/>
        <inertial pos="0.05 0 -0.2" quat="0.7 0.2 0.5 0.1" mass="2" diaginertia="0.03 0.02 0.01"/>
        <site name="thigh" pos="0 0.02 -0.1" quat="0.5 0.4 0.3 0.7"/>
        <body name="foot" pos="0 0 -0.4">
          <joint name="knee" axis="1 0 0" damping="0.3"/>
          <inertial pos="0.03 0.01 -0.1" mass="0.7" diaginertia="0.004 0.005 0.002"/>
          <geom name="ball" type="sphere" size="0.07" pos="0.05 0 -0.3" mass="0"/>
          <site name="foot" pos="0.02 -0.03 -0.05" quat="0.6 0.1 0.7 0.3"/>
          <site name="sole" size="1"/>
        </body>
      </body>
      <body name="hand" pos="-0.2 0 0.3">
        <joint name="shoulder" axis="0 0.6 0.8"/>
        <inertial pos="0 0.1 0.1" quat="0.6 0.1 0.2 0.7" mass="1" diaginertia="0.01 0.02 0.015"/>
        <site name="hand" pos="0.1 0 0.1" quat="0.1 0.4 0.8 0.4"/>
      </body>
    </body>
  </worldbody>
  <actuator><motor name="hip" joint="hip" gear="8"/><motor name="shoulder" joint="shoulder" gear="5"/></actuator>
  <sensor>
    <subtreeangmom name="momentum_of_all" body="world"/>
    <force name="thigh_force" site="thigh"/>
    <accelerometer name="hand_accelerometer" site="hand"/>
    <torque name="thigh_torque" site="thigh"/>
    <torque name="hand_torque" site="hand"/>
    <framepos name="foot_centre" objtype="body" objname="foot"/>
    <framequat name="thigh_principal" objtype="body" objname="thigh"/>
    <framelinvel name="hand_centre_velocity" objtype="body" objname="hand"/>
    <framepos name="foot_origin" objtype="xbody" objname="foot"/>
    <framelinvel name="foot_velocity" objtype="site" objname="foot"/>
    <frameangvel name="foot_angular" objtype="site" objname="foot"/>
    <framequat name="foot_frame" objtype="site" objname="foot"/>
    <gyro name="foot_gyro" site="foot"/>
    <velocimeter name="hand_velocimeter" site="hand"/>
    <force name="foot_force" site="foot"/>
    <torque name="foot_torque" site="foot"/>
    <accelerometer name="foot_accelerometer" site="foot"/>
    <touch name="foot_touch" site="sole"/>
    <force name="torso_force" site="torso"/>
    <subtreeangmom name="momentum_of_leg" body="thigh"/>
    <jointpos name="hip_position" joint="hip"/>
    <actuatorfrc name="shoulder_force" actuator="shoulder"/>
    <jointactuatorfrc name="hip_torque" joint="hip"/>
    <jointvel name="knee_velocity" joint="knee"/>
  </sensor>
</mujoco>
"""
# Sensors of the last substep; the others are of its end.
LATE = ("FORCE", "TORQUE", "ACCELEROMETER", "TOUCH")


def rig():
    return mujoco.MjModel.from_xml_string(RIG)


@pytest.mark.parametrize(
    ("xml", "words"),
    [
        ('<rangefinder name="probe" site="tip"/>', "'probe' is of type rangefinder"),
        ('<framepos name="probe" objtype="site" objname="tip" reftype="body" refname="hand"/>', "'probe' has a frame"),
        ('<accelerometer name="probe" site="base"/>', "'probe' is fixed to the world"),
        ('<force name="probe" site="base"/>', "'probe' is fixed to the world"),
    ],
)
def test_sensors_that_the_tensors_do_not_tell_are_refused_by_name(xml, words):
    sites = ('<body name="hand"', '<site name="tip"/><body name="hand"')
    model = arm(
        edited("<sensor>", "<sensor>" + xml).replace(*sites).replace("<worldbody>", '<worldbody><site name="base"/>')
    )
    with pytest.raises(InputError, match=words) as error:
        sensing.sensors_of(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["cartpole", "ant", "humanoid", "humanoid_run", "g1"])
def test_every_sensor_of_the_tasks_is_taken(name):
    model = task_model(name)
    assert [s.name for s in sensing.sensors_of(model)] == [model.sensor(i).name for i in range(model.nsensor)]


def body_states(model, data, ids, of_com):
    """Isaac Gym's rigid body states `[bodies, 13]` in MuJoCo's state, by MuJoCo's own functions."""
    rows, velocity = np.zeros((len(ids), 13)), np.zeros(6)
    for i, b in enumerate(ids):
        kind = mujoco.mjtObj.mjOBJ_BODY if of_com else mujoco.mjtObj.mjOBJ_XBODY
        mujoco.mj_objectVelocity(model, data, kind, b, velocity, 0)
        rows[i] = [*data.xpos[b], *data.xquat[b][1:], data.xquat[b][0], *velocity[3:], *velocity[:3]]
    return rows


def contact_forces(model, data, ids):
    """`[bodies, 3]` sums of the forces of contacts, world frame."""
    forces, force = np.zeros((len(ids), 3)), np.zeros(6)
    for c in range(data.ncon):
        mujoco.mj_contactForce(model, data, c, force)
        contact = data.contact[c]
        for geom, sign in ((contact.geom1, -1), (contact.geom2, 1)):
            if model.geom_bodyid[geom] in ids:
                forces[ids.index(model.geom_bodyid[geom])] += sign * contact.frame.reshape(3, 3).T @ force[:3]
    return forces


class Recorded:
    """What MuJoCo's sensors say of a substep, and what Isaac Gym's tensors would."""

    def __init__(self, model, data, of_com):
        sensors, table = sensing.sensors_of(model), layout.actuator_table(model)
        ids, moved = sensing.watched(model, sensors), sensing.accelerated(model, sensors)
        mujoco.mj_forward(model, data)
        self.before = body_states(model, data, moved, of_com)
        wrench = data.xfrc_applied.copy()
        mujoco.mj_step(model, data)
        self.contact = contact_forces(model, data, ids)
        late = data.sensordata.copy()
        mujoco.mj_forward(model, data)
        self.body = body_states(model, data, ids, of_com)
        row = lambda x: torch.tensor(np.array(x))[None]  # noqa: E731
        limits = np.where(model.actuator_forcelimited[:, None], model.actuator_forcerange, [-np.inf, np.inf])
        gain, kv = torch.tensor(model.actuator_gainprm[:, 0]), torch.tensor(-model.actuator_biasprm[:, 2])
        low, high = (torch.tensor(limits[:, k]) for k in (0, 1))
        force = layout.actuator_force(table, row(data.ctrl), row(data.qpos), row(data.qvel), gain, kv, low, high)
        self.motion = sensing.Motion(
            row(self.body), row(self.contact), row(self.before), row(data.qpos), row(data.qvel), force,
            row(wrench),
        )  # fmt: skip
        self.expected = np.zeros(model.nsensordata)
        for s in sensors:
            self.expected[s.place] = (late if s.kind in LATE else data.sensordata)[s.place]
        self.sensors = sensors
        # Accelerations are known to SUBSTEP times how fast they change, which is in proportion to the largest force.
        self.late_limit = 1e-5 * max(1.0, *(np.abs(late[s.place]).max() for s in sensors if s.kind in LATE), 0.0)
        self.inertial = [row(x) for x in (model.body_mass, model.body_inertia, model.body_ipos)]

    def limit(self, sensor):
        return self.late_limit if sensor.kind in LATE else 1e-8


def array(model, inertial, of_com, dtype=torch.float64):
    return sensing.SensorArray(
        model, sensing.sensors_of(model), sensing.Inertial(*inertial), of_com=of_com,
        gravity=torch.tensor(model.opt.gravity), substep=float(model.opt.timestep), dtype=dtype,
    )  # fmt: skip


def fine(model):
    """With the explicit integrator and a short substep: velocities change by the accelerations that MuJoCo tells."""
    model.opt.timestep, model.opt.integrator = SUBSTEP, int(mujoco.mjtIntegrator.mjINT_EULER)
    model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_EULERDAMP)
    return model


def standing(model, seed):
    """A robot in motion, with a little of its lowest part in the floor if it has a floor and a free root."""
    data = random_data(model, seed)
    if model.njnt and model.jnt_type[0] == 0:
        if model.nkey:
            data.qpos[:] = model.key("stand").qpos + 0.01 * noise(model.nq, seed=seed).numpy()
        data.qpos[3:7] = [1, 0, 0, 0] + 0.1 * noise(4, seed=seed).numpy()
        data.qpos[3:7] /= np.linalg.norm(data.qpos[3:7])
        limited = np.flatnonzero(model.jnt_limited)
        data.qpos[model.jnt_qposadr[limited]] = data.qpos[model.jnt_qposadr[limited]].clip(*model.jnt_range[limited].T)
        mujoco.mj_forward(model, data)
        reach = np.where(model.geom_type == int(mujoco.mjtGeom.mjGEOM_CAPSULE), model.geom_size[:, 1], 0)
        lowest = data.geom_xpos[:, 2] - model.geom_size[:, 0] - reach * np.abs(data.geom_xmat[:, 8])
        touching = (model.geom_type != 0) & (model.geom_conaffinity != 0)
        data.qpos[2] -= lowest[touching].min() + 0.002
    data.qvel[:] = noise(model.nv, seed=seed)
    data.ctrl[:] = noise(model.nu, seed=seed)
    return data


@pytest.mark.parametrize("of_com", [True, False])
@pytest.mark.parametrize("make", [rig, humanoid, arm, ant])
def test_sensors_are_mujocos(make, of_com):
    model = fine(make())
    touched = 0
    for seed in range(4):
        data = standing(model, seed)
        data.xfrc_applied[1:] = 3 * noise(model.nbody - 1, 6, seed=seed)
        case = Recorded(model, data, of_com)
        values = array(model, case.inertial, of_com)(case.motion)
        assert values.shape == (1, model.nsensordata) and values.dtype == torch.float64
        for sensor in case.sensors:
            actual, expected = values[0, sensor.place].numpy(), case.expected[sensor.place]
            np.testing.assert_allclose(actual, expected, rtol=0, atol=case.limit(sensor), err_msg=sensor.name)
            touched += sensor.kind == "TOUCH" and expected[0] > 0.5
    assert touched > 1 or make is arm
