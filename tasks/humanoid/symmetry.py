"""What each thing that the balancing humanoid observes is in the mirror, so that left and right can be exchanged.

The model is symmetric to the last digit: masses, limits, servos and the standing pose (see humanoid.xml). Joint
positions are seen as offsets from that pose and actions are offsets of targets from it, so that both are mirrored as
angles are.
"""

from rlcore.env import Env
from rlcore.symmetry import Symmetry, make_symmetry

PARTS = {
    "angular_velocity": "axial",
    "gravity": "polar",
    "joint_position": "joints",
    "joint_velocity": "joints",
    "last_action": "action",
    "linear_velocity": "polar",
    "height": "scalar",
    "foot_contact": "feet",
}


def balance_symmetry(env: Env) -> Symmetry:
    """The maps of the balance task, or of an environment wrapped around it.

    Raises:
      InputError: if the environment shows parts that are not the balance task's.
    """
    return make_symmetry(env.spec, PARTS)
