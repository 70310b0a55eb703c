"""Sensors computed from Isaac Gym's tensors, against MuJoCo's own."""

import re

import mujoco
import numpy as np
import pytest
import torch
from torch.func import vmap

from rlcore.errors import InputError
from rlcore.physics import isaacgym_model as layout
from rlcore.physics import isaacgym_sensors as sensing
from rlcore.physics.isaacgym import IsaacGymEngine, Settings
from rlcore.physics.mujoco import MujocoEngine
from rlcore.tree import map_leaves
from tests.rlcore.physics.test_isaacgym import _one_thread, python  # noqa: F401
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
    <jointactuatorfrc name="knee_torque" joint="knee"/>
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


def test_masses_are_those_of_each_robot():
    """Centres, masses and inertias that differ from robot to robot, and in no robot are the model's."""
    nominal, generator, cases = fine(rig()), np.random.default_rng(0), []
    for seed in range(3):
        model = fine(rig())
        model.body_ipos[1:] += 0.05 * generator.standard_normal((model.nbody - 1, 3))
        model.body_mass[1:] *= generator.uniform(0.5, 2.0, model.nbody - 1)
        model.body_inertia[1:] *= generator.uniform(0.8, 1.2, (model.nbody - 1, 1))
        data = standing(model, seed)
        mujoco.mj_setConst(model, mujoco.MjData(model))
        cases.append(Recorded(model, data, of_com=True))
    motion = sensing.Motion(*(torch.cat(parts) for parts in zip(*(c.motion for c in cases), strict=True)))
    every = [torch.cat(parts) for parts in zip(*(c.inertial for c in cases), strict=True)]
    values = array(nominal, every, True)(motion)
    for i, case in enumerate(cases):
        for s in case.sensors:
            np.testing.assert_allclose(values[i, s.place], case.expected[s.place], rtol=0, atol=case.limit(s))
    # And none of the three is left out.
    fields = nominal.body_mass, nominal.body_inertia, nominal.body_ipos
    for k, field in enumerate(fields):
        partly = [torch.tensor(field).expand_as(x) if i == k else x for i, x in enumerate(every)]
        wrong = array(nominal, partly, True)(motion)
        off = {s.name for s in cases[0].sensors if (wrong - values)[:, s.place].abs().max() > 10 * cases[0].limit(s)}
        assert {"momentum_of_all", "momentum_of_leg", "thigh_torque"} <= off
        assert ("foot_centre" in off) == (k == 2)


def test_single_precision_is_enough_far_from_the_origin():
    """A kilometre away, where positions are rounded to 0.06 mm, as where an episode of running ends."""
    model = rig()
    model.opt.timestep, model.opt.integrator = 0.0083, int(mujoco.mjtIntegrator.mjINT_EULER)
    case = Recorded(model, standing(model, 0), of_com=True)
    near = array(model, case.inertial, True)(case.motion)
    shift = torch.zeros(13).double()
    shift[0:2] = torch.tensor([1000.0, -700.0])
    far = case.motion._replace(body=(case.motion.body + shift).float(), before=(case.motion.before + shift).float())
    values = array(model, case.inertial, True, torch.float32)(far._replace(contact=far.contact.float()))
    for s in case.sensors:
        if s.kind != "FRAMEPOS":
            # An arm that is rounded so turns the force of the contact into as much torque.
            limit = 6e-5 * float(case.motion.contact.norm(dim=-1).max()) if s.kind == "TORQUE" else 1e-4
            torch.testing.assert_close(values[:, s.place], near[:, s.place], rtol=0, atol=limit, msg=s.name)


def test_torques_of_feet_with_several_shapes_err_within_their_extent():
    """Where a foot on the floor is pushed is not told: its torque may be wrong by the force times half its length."""
    model, errors = fine(task_model("humanoid_run")), []
    for seed in range(8):
        case = Recorded(model, standing(model, seed), of_com=True)
        values = array(model, case.inertial, True)(case.motion)[0].numpy()
        for s in case.sensors:
            if s.kind == "FORCE":
                np.testing.assert_allclose(values[s.place], case.expected[s.place], rtol=0, atol=case.limit(s))
            if s.kind == "TORQUE":
                foot = next(i for i, b in enumerate(sensing.watched(model, case.sensors)) if b == s.body)
                pushed = float(case.motion.contact[0, foot].norm())
                error = np.abs(values[s.place] - case.expected[s.place]).max()
                # Heel and toes are 0.2 m apart.
                assert error <= 0.1 * pushed + case.limit(s)
                errors.append((pushed, error))
    pushed, error = np.array(errors).T
    assert (pushed > 1.0).sum() > 3 and (pushed == 0.0).any()
    # A robot on its heels or its toes knows more than that.
    assert np.median(error[pushed > 1.0] / pushed[pushed > 1.0]) < 0.05


def test_a_step_of_one_substep_and_rows_just_reset(python):  # noqa: F811
    """Velocities before the substep are the states' that are given, of rows that go on and of rows just written."""
    model = mujoco.MjModel.from_xml_string(re.sub(r' damping="[0-9.]*"', "", RIG))
    model.opt.timestep, model.opt.integrator = 1e-3, int(mujoco.mjtIntegrator.mjINT_IMPLICITFAST)
    engine, reference = IsaacGymEngine(model, Settings(python)), MujocoEngine(model, 1)
    draw = np.random.default_rng(1)
    masses = np.concatenate([np.zeros(1), draw.uniform(1, 2, model.nbody - 1)])
    centres = model.body_ipos + 0.05 * draw.standard_normal((4, model.nbody, 3)) * (masses > 0)[:, None]
    params = {"body_ipos": torch.tensor(centres), "body_mass": torch.tensor(masses).expand(4, -1).clone()}
    start = lambda seeds: [standing(model, seed) for seed in seeds]  # noqa: E731
    as_state = lambda datas: vmap(reference.initial)(  # noqa: E731
        torch.tensor(np.stack([d.qpos for d in datas])), torch.tensor(np.stack([d.qvel for d in datas]))
    )
    ctrl, wrench = noise(4, 2), noise(4, model.nbody, 6, seed=5)
    wrench[:, 0] = 0.0
    late = [s for s in sensing.sensors_of(model) if s.kind in LATE]

    def check(states, substeps):
        step = lambda e: vmap(lambda p, s, c, w: e.step(p, s, c, w, substeps=substeps))(params, states, ctrl, wrench)  # noqa: E731
        after, expected = step(engine), step(reference)
        # Accelerations change by about 1 % within a substep.
        limit = 0.02 * max(float(expected.sensordata[:, s.place].abs().max()) for s in late)
        for s in late:
            told = expected.sensordata[:, s.place]
            torch.testing.assert_close(after.sensordata[:, s.place], told, rtol=0, atol=limit, msg=s.name)
        return after

    fresh, other = as_state(start(range(4))), as_state(start(range(4, 8)))
    state = check(check(fresh, 1), 1)
    assert engine.simulator(4, params).written == 0
    reset = torch.tensor([False, True, False, True])
    mixed = map_leaves(lambda a, b: torch.where(reset.reshape(-1, *[1] * (a.ndim - 1)), a, b), other, state)
    check(mixed, 1)
    assert engine.simulator(4, params).written == 2
    check(check(mixed, 3), 2)
    engine.close()
