"""Where wall time goes: seconds by name, added up on this machine until somebody asks.

A log, as recorded faults are: nothing that is computed depends on it, so a function that is timed stays pure. What is
timed is a call on the host. A GPU works on after the call has returned, so whoever times work there waits for it first,
or does not time it: `unroll` waits, once for all its steps, and an engine on a GPU is not timed.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

PHYSICS, ROLLOUT = "physics", "rollout"
"""Time in engines, and in unrolling a policy in an environment, physics included."""

_seconds: dict[str, float] = {}


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Add the seconds that the block takes to those of `name`, also where it raises. Costs a microsecond."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        _seconds[name] = _seconds.get(name, 0.0) + time.perf_counter() - begin


def drain_seconds() -> dict[str, float]:
    """The seconds by name since the last call, which forgets them."""
    seconds = dict(_seconds)
    _seconds.clear()
    return seconds


def shares(seconds: dict[str, float], total: float) -> dict[str, float]:
    """How the `total` seconds of an iteration were shared, as metrics that add up to 1.

    Returns:
      `time/physics_share`: in the engine. `time/policy_and_env_share`: the rest of the rollout, which is the policy,
      observations, rewards and resets. `time/learning_share`: the rest of the iteration. Where no engine was timed,
      `time/rollout_share` stands for the first two; empty where nothing was rolled out.
    """
    if ROLLOUT not in seconds or not total > 0:
        return {}
    rollout = min(seconds[ROLLOUT], total)
    learning = {"time/learning_share": (total - rollout) / total}
    if PHYSICS not in seconds:
        return {"time/rollout_share": rollout / total, **learning}
    physics = min(seconds[PHYSICS], rollout)
    return {
        "time/physics_share": physics / total,
        "time/policy_and_env_share": (rollout - physics) / total,
        **learning,
    }
