"""What simulates and what rewards weigh: the settings that experiments share."""

from dataclasses import dataclass, field

from rlcore.physics.engines import Physics, PhysicsChoice, choose
from rlcore.physics.isaacgym_settings import Settings


@dataclass(frozen=True)
class SimulationConfig:
    """The part of an experiment's configuration that chooses the physics and weighs the rewards."""

    physics: Physics = "mujoco"
    """What simulates: mujoco on CPUs; warp on an NVIDIA GPU, where learning runs then too; or isaacgym, see its page
    in docs/."""
    num_threads: int = 0
    """Physics threads on CPUs; 0 takes every CPU. The result does not depend on it."""
    isaacgym: Settings = field(default_factory=Settings)
    """How Isaac Gym runs, with --physics isaacgym."""
    reward_weights: dict[str, float] = field(default_factory=dict)
    """Weights of reward terms, per second, in place of the task's own: NAME WEIGHT NAME WEIGHT ..."""

    @property
    def engine(self) -> PhysicsChoice:
        """What a task is told of all this."""
        return choose(self.physics, self.isaacgym)
