"""What it costs to have Isaac Gym in another process: the time of a control step without its physics.

Two parts are told: the round trip alone, in which the server copies the states out and answers, and the whole step as
the engine makes it, with the translation of controls and states and the sensors. Both are medians, in ms.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.report import machine, machine_line
from rlcore.errors import check_field
from rlcore.physics.engine import Rows
from rlcore.physics.engines import check_available
from rlcore.physics.isaacgym import IsaacGymEngine
from rlcore.physics.isaacgym_settings import Settings
from rlcore.physics.mujoco import load_model
from tasks.humanoid.body import MODEL


@dataclass(frozen=True)
class Config:
    """Time the bridge to Isaac Gym, with humanoids. Nothing else should run."""

    num_envs: int = 4096
    """Humanoids."""
    steps: int = 200
    """Steps timed, after as many tenths that are not."""
    isaacgym: Settings = field(default_factory=Settings)
    """How Isaac Gym runs."""

    def __post_init__(self) -> None:
        for name in ("num_envs", "steps"):
            check_field("--", self, name, getattr(self, name) >= 1, "at least 1")


def main(config: Config) -> None:
    """Print the two times."""
    check_available(config.isaacgym)
    engine = IsaacGymEngine(load_model(MODEL), config.isaacgym)
    try:
        _measure(config, engine)
    finally:
        engine.close()


def _measure(config: Config, engine: IsaacGymEngine) -> None:
    n, model = config.num_envs, engine.model
    simulator = engine.simulator(n)
    qpos = torch.tensor(engine.mjmodel.qpos0, device=engine.device).repeat(n, 1)
    zeros = lambda width: torch.zeros(n, width, dtype=torch.float64, device=engine.device)  # noqa: E731
    state = Rows(zeros(1)[:, 0], qpos, zeros(model.nv), zeros(0), zeros(model.nv), zeros(model.nsensor))
    ctrl, sane = zeros(model.nu), torch.ones(n, dtype=torch.bool, device=engine.device)

    def whole() -> None:
        nonlocal state
        qpos, qvel, sensordata = simulator.step(state, ctrl, None, 4, sane, simulate=False)
        state = state._replace(qpos=qpos, qvel=qvel, sensordata=sensordata)
        if sensordata.is_cuda:
            torch.cuda.synchronize(sensordata.device)  # or what the GPU has still to do would not be counted

    def round_trip() -> None:
        simulator.server.step(4, 0, False, simulate=False)

    print(machine_line(machine()))
    place = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "the CPU's memory"
    print(f"{n} humanoids, tensors on {place}, without physics, median of {config.steps} steps")
    for name, call in (("round trip", round_trip), ("whole step", whole)):
        print(f"{name}: {_median(call, config.steps):.2f} ms", flush=True)
    print(f"rows written in the last step: {simulator.written}")


def _median(call: Callable[[], None], count: int) -> float:
    for _ in range(max(1, count // 10)):
        call()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


if __name__ == "__main__":
    from experiments.cli import command

    command(Config, main)
