"""Steps per second against the number of environments, from the bare engine up to a whole PPO iteration.

Four levels are measured, each of which contains the one before:

    engine   mujoco.batch.Batch.step alone: the same model, threads, substeps and sensors
    env      batch(auto_reset(task)).step: observations, rewards, pushes, resets
    policy   rollout.unroll: the same with PPO's policy sampling the actions
    ppo      algorithm.update: the same, and learning from it

The cost of a physics step depends on what the robots are doing, so all levels meet the same robots. They begin
in states that the policy leads to in the middle of an episode, of episodes of all ages. The bare engine is
given the very positions, velocities, warm starts, controls and model fields that the environment gave to its engine
in the block before; writing them is not timed. What PPO learns is thrown away after each update, so that the policy
stays what it was. Levels take turns, block by block in one process, and a ratio is that of two neighbouring
blocks: a machine that slows down slows them all.
"""

import contextlib
import dataclasses
import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any, Literal, NamedTuple

from benchmarks.report import RESULTS, header, machine_line, made, spread
from rlcore.errors import InputError
from rlcore.metrics import write_json

LEVELS = ("engine", "env", "policy", "ppo")
EXPERIMENTS = {
    "humanoid_balance": "experiments.ppo_humanoid_balance",
    "humanoid_velocity": "experiments.ppo_humanoid_velocity",
    "humanoid_run": "experiments.ppo_humanoid_run",
    "ant": "experiments.ppo_ant",
    "cartpole": "experiments.ppo_cartpole",
}

# What `--gate` asks of a level's share of the bare engine's speed, from this many environments on.
GATE_ENVS = 512
GATE = {"env": 0.90, "ppo": 0.50}

# Control steps before the first state is taken, and between two states of one robot.
_BURN_IN_STEPS, _STRIDE_STEPS = 300, 5
# Control steps of each level before it is timed: as many as there are sizes of resets to record (to 8192 robots).
_RECORDED_STEPS = 9
# The states of a block that are kept for the bare engine; a block of more steps goes through them again.
_MOST_KEPT_BYTES = 256e6


@dataclass(frozen=True)
class Config:
    """Measure steps per second against the number of environments, from the bare engine up to PPO.

    Prints a table and writes throughput_TASK.json and throughput_TASK.png. Nothing else should run on the
    machine meanwhile.

    Examples:
      python -m benchmarks.throughput --quick
      python -m benchmarks.throughput --task cartpole --env-counts 1 1024
      python -m benchmarks.throughput --run runs/ppo_humanoid_balance/20260101-120000-seed0
    """

    task: Literal["humanoid_balance", "humanoid_velocity", "humanoid_run", "ant", "cartpole"] = "humanoid_balance"
    """What the robots do."""
    run: Path | None = None
    """A trained run of that task whose policy acts, so that most robots stand, and whose robots it acts on, where
    these differ; by default an untrained one acts, as at the start of training."""
    env_counts: tuple[int, ...] | None = None
    """Numbers of environments; by default the powers of two from 1 to 8192."""
    blocks: int | None = None
    """Blocks of each level, of which medians are taken; 7 by default."""
    block_seconds: float | None = None
    """About how long a block lasts, 1 s by default; a block of PPO is at least one update."""
    num_threads: int = 0
    """Physics threads; 0 takes every CPU."""
    seed: int = 0
    """Seed of states, actions and untrained networks."""
    quick: bool = False
    """Less of everything, in under a minute: 1, 64, 512 and 2048 environments, 5 blocks of 0.25 s."""
    gate: bool = False
    """Leave with exit code 1 if, at 512 environments or more, env does less than 0.90 or ppo less than 0.50 of
    the engine's steps per second."""
    output_dir: Path = RESULTS
    """Where the files go."""

    def __post_init__(self) -> None:
        bad = [n for n in self.counts if n < 1]
        if bad or not self.counts:
            raise InputError(f"env_counts must be numbers of at least 1, got {bad or 'none'} (--env-counts)")
        if self.num_blocks < 1:
            raise InputError(f"blocks must be at least 1, got {self.blocks} (--blocks)")
        if not 0 < self.seconds < 3600:
            raise InputError(
                f"block_seconds must be more than 0 and below 3600, got {self.block_seconds} (--block-seconds)"
            )
        if self.num_threads < 0:
            raise InputError(f"num_threads must be 0 (every CPU) or more, got {self.num_threads} (--num-threads)")
        if self.seed < 0:
            raise InputError(f"seed must be 0 or more, got {self.seed} (--seed)")

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of environments, each once and in order."""
        if self.env_counts is not None:
            return tuple(sorted(set(self.env_counts)))
        return (1, 64, 512, 2048) if self.quick else tuple(2**i for i in range(14))

    @property
    def num_blocks(self) -> int:
        """How many blocks."""
        return self.blocks if self.blocks is not None else 5 if self.quick else 7

    @property
    def seconds(self) -> float:
        """Wanted length of a block."""
        return self.block_seconds if self.block_seconds is not None else 0.25 if self.quick else 1.0


# --- figures ------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """One level's turn: control steps of all environments together, and seconds."""

    steps: int
    seconds: float


def summary(blocks: Mapping[str, Sequence[Block]], num_envs: int, substeps: int) -> dict[str, Any]:
    """The figures of one number of environments.

    Args:
      blocks: of each level, in the order in which they were run.
      num_envs: environments.
      substeps: physics steps in a control step.

    Returns:
      For each level its median control and physics steps per second and, except for the engine, its `share`:
      the median over blocks of its speed divided by that of the engine's block beside it.
    """
    speeds = {level: [block.steps / block.seconds for block in blocks[level]] for level in LEVELS}
    levels: dict[str, Any] = {}
    for level, speed in speeds.items():
        levels[level] = {
            "control_steps_per_second": spread(speed),
            "physics_steps_per_second": spread([substeps * x for x in speed]),
            "blocks": [block._asdict() for block in blocks[level]],
        }
        if level != "engine":
            levels[level]["share"] = spread([x / y for x, y in zip(speed, speeds["engine"], strict=True)])
    return {"num_envs": num_envs, "levels": levels}


def shortfalls(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each level that is slower than the gate allows."""
    return [
        f"{level}/engine is {share:.3f} at {row['num_envs']} environments, below {least:.2f}"
        for row in rows
        for level, least in GATE.items()
        if row["num_envs"] >= GATE_ENVS and (share := row["levels"][level]["share"]["median"]) < least
    ]


def table(figures: Mapping[str, Any]) -> str:
    """The figures as lines for a person."""

    def speeds(kind: str) -> list[str]:
        lines = [f"{kind.replace('_', ' ')}, median", f"{'envs':>6}" + "".join(f"{x:>13}" for x in LEVELS)]
        for row in figures["rows"]:
            medians = (row["levels"][level][kind]["median"] for level in LEVELS)
            lines.append(f"{row['num_envs']:>6}" + "".join(f"{x:>13,.0f}" for x in medians))
        return lines

    shares = ["share of the engine's speed, median (lowest .. highest block)"]
    shares.append(f"{'envs':>6}" + "".join(f"{x + '/engine':>24}" for x in LEVELS[1:]))
    for row in figures["rows"]:
        cells = (row["levels"][level]["share"] for level in LEVELS[1:])
        texts = (f"{x['median']:.3f} ({x['min']:.3f} .. {x['max']:.3f})" for x in cells)
        shares.append(f"{row['num_envs']:>6}" + "".join(f"{x:>24}" for x in texts))
    lines = [
        f"{figures['task']}, actions sampled from {figures['policy']}",
        f"{figures['num_blocks']} blocks of about {figures['block_seconds']:g} s, "
        f"{figures['substeps']} physics steps in a control step",
        machine_line(figures["machine"]),
        "",
        *speeds("control_steps_per_second"),
        "",
        *speeds("physics_steps_per_second"),
        "",
        *shares,
    ]
    return "\n".join(lines)


def plot(figures: Mapping[str, Any], path: Path) -> None:
    """Draw speed and share against the number of environments."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 7.5), layout="constrained", dpi=130)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    counts = [row["num_envs"] for row in figures["rows"]]
    for number, level in enumerate(LEVELS):
        for axes, kind in ((above, "control_steps_per_second"), (below, "share")):
            if level == "engine" and kind == "share":
                continue
            spreads = [row["levels"][level][kind] for row in figures["rows"]]
            low, middle, high = ([x[key] for x in spreads] for key in ("min", "median", "max"))
            axes.plot(counts, middle, color=f"C{number}", marker="o", markersize=4, label=level)
            axes.fill_between(counts, low, high, color=f"C{number}", alpha=0.2, linewidth=0)
    above.set_xscale("log", base=2)
    above.set_yscale("log")
    above.set_ylabel("control steps per second")
    above.legend(frameon=False)
    below.axhline(1.0, color="C0", linewidth=1.0)
    below.set_ylim(bottom=0.0)
    below.set_ylabel("share of the engine's speed")
    below.set_xlabel("environments")
    below.set_xticks(counts, [str(n) for n in counts])
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    above.set_title("\n".join(wrap(f"{figures['task']}, {figures['policy']}", 80)), fontsize=10, loc="left")
    figure.suptitle(machine_line(figures["machine"]), fontsize=8, color="0.4")
    figure.savefig(path, format="png")


# --- what is measured ---------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """A task with its learner and a policy, for any number of environments."""

    env: Any
    """One robot, with automatic resets."""
    ppo: Any
    """PPOConfig."""
    state: Any
    """A TrainState whose networks act; its environments are not used."""
    limit: int
    """Control steps of an episode that nothing ends."""
    policy: str
    """What acts, in words."""
    robots: Any = None
    """Parameters of robots that differ, every leaf `[n, ...]`; None where all are the environment's own."""
    symmetry: Any = None
    """How the task looks in the mirror, where the networks are symmetric."""

    def params(self, count: int) -> Any:
        """The environments' parameters of `count` robots."""
        import torch

        from rlcore import tree

        if self.robots is None:
            return self.env.params
        known = len(tree.tree_flatten(self.robots)[0][0])
        return tree.map_leaves(torch.Tensor.contiguous, tree.index(self.robots, torch.arange(count) % known))


def subject(config: Config) -> Subject:
    """The task and policy to measure.

    Raises:
      InputError: if the run cannot be used, or is one of another task.
    """
    from algos.ppo import make_ppo
    from experiments.cli import load_run, restore_policy
    from rlcore import random, tree
    from rlcore.env import auto_reset

    if config.run is None:
        module = importlib.import_module(EXPERIMENTS[config.task])
        settings = module.Config(num_threads=config.num_threads)
        env = auto_reset(module.build(settings).env)
        ppo = settings.ppo
        few = dataclasses.replace(ppo, num_envs=min(ppo.num_envs, 64))
        learner = make_ppo(env, few, symmetry=_symmetry(config.task, env, ppo))
        state, policy = learner.init(random.key(config.seed)), "an untrained policy"
    else:
        run = load_run(config.run, {"num_threads": config.num_threads})
        if run.module.__name__ != EXPERIMENTS[config.task]:
            raise InputError(f"{config.run} is a run of {run.module.__name__}, not of the task {config.task} (--task)")
        restored = restore_policy(run)
        settings, env, ppo, state = run.config, auto_reset(run.experiment.env), run.config.ppo, restored.state
        policy = f"the policy of {config.run}, iteration {restored.iteration}"
    # Walking robots are trained in shorter episodes than they are shown in.
    seconds = getattr(settings, "training_episode_seconds", settings.episode_seconds)
    limit = round(seconds / env.spec.control_dt)
    ranks = [[x.ndim for x in tree.tree_flatten(params)[0]] for params in (state.env_params, env.params)]
    robots = None if ranks[0] == ranks[1] else state.env_params
    return Subject(env, ppo, state, limit, policy, robots, _symmetry(config.task, env, ppo))


def _symmetry(task: str, env: Any, ppo: Any) -> Any:
    """How the task looks in the mirror, where learning needs to know.

    Raises:
      InputError: where it does and this program does not know it.
    """
    if not ppo.symmetric:
        return None
    if task != "humanoid_velocity":
        raise InputError(f"runs of {task} that learn from its mirror image cannot be measured (--run)")
    from tasks.walking import walking_symmetry

    return walking_symmetry(env)


def sampling(env: Any, ppo: Any, symmetry: Any = None) -> Callable[..., Any]:
    """PPO's own way to act, for `rollout.unroll`: `((params, moments), obs, key) -> (action, extras)`."""
    from rlcore.distributions import gaussian_log_prob, gaussian_sample
    from rlcore.networks import mlp
    from rlcore.normalize import normalize
    from rlcore.symmetric_networks import symmetric_mlp

    sizes = (env.spec.observation_size("policy"), *ppo.policy_layers, env.spec.action_size)
    if symmetry is not None and ppo.symmetric_networks:
        network = symmetric_mlp(sizes, symmetry.observations["policy"], symmetry.action, ppo.activation)
    else:
        network = mlp(sizes, ppo.activation)

    def act(actor: Any, obs: Any, key: Any) -> tuple[Any, dict[str, Any]]:
        params, moments = actor
        seen = normalize(moments["policy"], obs["policy"]) if ppo.normalize_observations else obs["policy"]
        mean = network.apply(params.policy, seen)
        action = gaussian_sample(key, mean, params.log_std)
        return action, {"mean": mean, "log_prob": gaussian_log_prob(mean, params.log_std, action)}

    return act


class BareEngine:
    """`mujoco.batch` with the columns that an environment needs, and nothing around it."""

    def __init__(self, engine: Any, num_envs: int, substeps: int) -> None:
        from mujoco.batch import Batch

        self._batch = Batch(engine.mjmodel, num_envs, engine.num_threads)
        names = ("time", "qpos", "qvel", "act", "qacc_warmstart", "ctrl")
        self._inputs = [self._batch.bind(name) for name in names]
        self.qpos: Any = self._batch.bind("qpos")
        self.sensordata: Any = self._batch.bind("sensordata")
        self._substeps = substeps

    def give(self, fields: Mapping[str, Any]) -> None:
        """Make the simulations differ in these model fields, `[num_envs, ...]` or the same for all."""
        for name, value in fields.items():
            column: Any = self._batch.expand(name)
            column[:] = value.numpy()
        if fields:
            self._batch.set_const()

    def step(self, values: Sequence[Any]) -> float:
        """Step from `values` (time, qpos, qvel, act, warmstart, ctrl); the seconds without the writing."""
        from mujoco.batch import SimulationError

        for column, value in zip(self._inputs, values, strict=True):
            column[:] = value
        begin = time.perf_counter()
        # Where a simulation fails it failed in the environment too, which reports it.
        with contextlib.suppress(SimulationError):
            self._batch.step(nstep=self._substeps)
        return time.perf_counter() - begin


@contextlib.contextmanager
def watched(engine: Any, allowed: Mapping[str, Any] | None = None) -> Iterator[list[tuple[Any, ...]]]:
    """What an engine is asked to step meanwhile, as `BareEngine.step` takes it.

    Args:
      engine: of the environment.
      allowed: the model fields of its own that each robot may have: those that the bare engine was given.

    Raises:
      InputError: if robots have other model fields or forces on them, which the bare engine would lack.
    """
    known = allowed or {}
    kept: list[tuple[Any, ...]] = []
    plain, size = engine.step_rows, 0.0

    def step_rows(fields: Any, rows: Any, ctrl: Any, wrench: Any, substeps: int, key: Any) -> Any:
        nonlocal size
        if fields.keys() != known.keys() or wrench is not None:
            raise InputError("the bare engine cannot be compared where fields change or forces act on robots")
        if size < _MOST_KEPT_BYTES:
            values = (rows.time, rows.qpos, rows.qvel, rows.act, rows.warmstart, ctrl)
            kept.append(tuple(x.numpy() for x in values))
            size += sum(x.nbytes for x in kept[-1])
        return plain(fields, rows, ctrl, wrench, substeps, key)

    engine.step_rows = step_rows
    try:
        yield kept
    finally:
        del engine.step_rows


def visited(
    subject: Subject, run: Callable[..., Any], actor: Any, batched: Any, count: int, width: int, key: Any
) -> Any:
    """`count` environment states and observations as the policy visits them, from `width` robots.

    The robots go on for a while from episodes of random ages, so that time limits do not meet all at once.
    """
    import torch

    from rlcore import random, tree

    reset_key, age_key, run_key, order_key = random.split(key, 4).unbind(0)
    params = subject.params(width)
    state, obs = batched.reset(params, random.split(reset_key, width))
    state = tree.replace(state, steps=random.randint(age_key, (width,), 0, subject.limit))
    snapshots: list[Any] = []
    for number in range(-(_BURN_IN_STEPS // _STRIDE_STEPS), -(-count // width)):
        keys = random.split(random.fold_in(run_key, number + _BURN_IN_STEPS), _STRIDE_STEPS)
        state, obs, _ = run(actor, params, state, obs, keys)
        if number >= 0:
            snapshots.append((state, obs))
    pool = tree.map_leaves(lambda *x: torch.cat(x), *snapshots)
    return tree.index(pool, random.permutation(order_key, len(snapshots) * width)[:count])


def falling_due(state: Any, limit: int) -> Iterator[Any]:
    """`state` with episodes about to end, so that resets of every size that may come are recorded before timing.

    Resets are recorded for powers of two from 8 on: three quarters of each in a step of its own.
    """
    import torch

    from rlcore import tree

    count = len(state.steps)
    steps, begin, size, after = torch.zeros_like(state.steps), 0, 8, 1
    while size <= count // 4:
        rows = 3 * size // 4
        steps[begin : begin + rows] = limit - after
        begin, size, after = begin + rows, 2 * size, after + 1
    yield tree.replace(state, steps=steps)
    # In many environments more than a quarter never end at once.
    if count <= 256:
        yield tree.replace(state, steps=torch.full_like(steps, limit - 1))


class Bench:
    """The four levels over one subject."""

    def __init__(self, subject: Subject, seed: int) -> None:
        from rlcore import random
        from rlcore.env import batch
        from rlcore.jit import jit
        from rlcore.physics.mujoco import MujocoEngine
        from rlcore.rollout import unroll

        if not isinstance(subject.env.engine, MujocoEngine):
            raise InputError("throughput compares with mujoco.batch, which this task does not run on")
        self.subject = subject
        self.substeps: int = subject.env.spec.substeps
        self._key = random.key(seed + 1)
        self._drawn = 0
        self._known: dict[int, Any] = {}
        act = sampling(subject.env, subject.ppo, subject.symmetry)
        self._act = jit(act)
        self._batched = batch(subject.env, shared_params=subject.robots is None)
        self._run = unroll(self._batched, act)
        self._actor = (subject.state.params, subject.state.observation_moments)

    def _keys(self, count: int) -> Any:
        from rlcore import random

        self._drawn += 1
        return random.split(random.fold_in(self._key, self._drawn), count)

    def _params(self, count: int) -> Any:
        """The same tensors each time, as training has them: an engine knows fields that it has seen."""
        if count not in self._known:
            self._known = {count: self.subject.params(count)}
        return self._known[count]

    def states(self, count: int, width: int) -> Any:
        """As many states and observations as the largest number of environments needs."""
        return visited(self.subject, self._run, self._actor, self._batched, count, width, self._keys(1)[0])

    def env_block(self, state: Any, obs: Any, keys: Any) -> tuple[float, Any, Any]:
        """Seconds of the environment's step alone; the actions are sampled between."""
        from rlcore.jit import one_thread

        total, params = 0.0, self._params(len(state.steps))
        for key in keys.unbind(0):
            with one_thread(len(state.steps)):
                action, _ = self._act(self._actor, obs, key)
            begin = time.perf_counter()
            state, transition = self._batched.step(params, state, action)
            total += time.perf_counter() - begin
            obs = transition.obs
        return total, state, obs

    def policy_block(self, state: Any, obs: Any, steps: int) -> tuple[float, Any, Any]:
        """Seconds of unrolling, in the lengths that PPO does."""
        total, params = 0.0, self._params(len(state.steps))
        for keys in self._keys(steps).split(self.subject.ppo.num_steps):
            begin = time.perf_counter()
            state, obs, _ = self._run(self._actor, params, state, obs, keys)
            total += time.perf_counter() - begin
        return total, state, obs

    def ppo_block(self, algorithm: Any, state: Any, obs: Any, updates: int) -> tuple[float, Any, Any]:
        """Seconds of whole updates, each by the same networks."""
        from rlcore import tree

        total, params = 0.0, self._params(len(state.steps))
        for key in self._keys(updates).unbind(0):
            before = tree.replace(self.subject.state, env_params=params, env_state=state, obs=obs, key=key)
            begin = time.perf_counter()
            after, metrics = algorithm.update(before)
            float(metrics["loss/value"])
            total += time.perf_counter() - begin
            state, obs = after.env_state, after.obs
        return total, state, obs

    def turn(self, block: Callable[..., tuple[float, Any, Any]], *args: Any) -> tuple[float, Any, Any]:
        """Run a block and hand its states on in one layout, since recordings are made for a layout."""
        from rlcore import tree

        seconds, state, obs = block(*args)
        state, obs = (tree.map_leaves(lambda x: x.contiguous(), x) for x in (state, obs))
        return seconds, state, obs

    def measure(
        self, state: Any, obs: Any, num_blocks: int, seconds: float, tell: Callable[[str], None]
    ) -> dict[str, list[Block]]:
        """Blocks of every level, in turn, from these states on."""
        from algos.ppo import make_ppo

        subject, num_envs = self.subject, len(state.steps)
        num_steps = subject.ppo.num_steps
        # It acts on the robots that it is given; none are drawn.
        drawn = None if subject.robots is None else lambda params, key: params
        ppo = dataclasses.replace(subject.ppo, num_envs=num_envs)
        algorithm = make_ppo(subject.env, ppo, drawn, subject.symmetry)
        bare = BareEngine(subject.env.engine, num_envs, self.substeps)
        fields = {} if subject.robots is None else self._params(num_envs).physics
        bare.give(fields)
        tell(f"{num_envs} environments: recording")
        for due in falling_due(state, subject.limit):
            self.env_block(due, obs, self._keys(_RECORDED_STEPS))
            self.policy_block(due, obs, _RECORDED_STEPS)
            update = self.ppo_block(algorithm, due, obs, 1)[0]
        took = self.policy_block(state, obs, 3)[0] / 3
        env_steps = max(1, round(seconds / took))
        if update < 2 * seconds:  # else one update fills a block even if recording took half of this one
            update = self.ppo_block(algorithm, state, obs, 1)[0]
        updates = max(1, round(seconds / update))
        blocks: dict[str, list[Block]] = {level: [] for level in LEVELS}
        for number in range(num_blocks):
            tell(f"{num_envs} environments: block {number + 1} of {num_blocks}")
            # The same steps twice, watched and timed: to keep what is watched takes memory from the allocator.
            keys = self._keys(env_steps)
            with watched(subject.env.engine, fields) as kept:
                self.env_block(state, obs, keys)
            env_seconds, state, obs = self.turn(self.env_block, state, obs, keys)
            bare.step(kept[0])  # the threads of the engine are awake, as they are in the other levels
            bare_seconds = sum(bare.step(kept[i % len(kept)]) for i in range(env_steps))
            policy_seconds, state, obs = self.turn(self.policy_block, state, obs, env_steps)
            ppo_seconds, state, obs = self.turn(self.ppo_block, algorithm, state, obs, updates)
            blocks["engine"].append(Block(env_steps * num_envs, bare_seconds))
            blocks["env"].append(Block(env_steps * num_envs, env_seconds))
            blocks["policy"].append(Block(env_steps * num_envs, policy_seconds))
            blocks["ppo"].append(Block(updates * num_steps * num_envs, ppo_seconds))
        return blocks


# --- the program --------------------------------------------------------------------------------------------


def main(config: Config) -> None:
    """Measure, print the table, write the files."""
    from experiments.cli import progress_line
    from rlcore import tree
    from rlcore.training import use_threads

    use_threads(0)  # as training does
    with progress_line() as tell:
        tell("preparing")
        bench = Bench(subject(config), config.seed)
        output = made(config.output_dir)
        widest = config.counts[-1]
        pool, seen = bench.states(widest, min(widest, 64 if config.quick else 256))
        rows = []
        for count in config.counts:
            state, obs = (tree.index(x, slice(count)) for x in (pool, seen))
            blocks = bench.measure(state, obs, config.num_blocks, config.seconds, tell)
            rows.append(summary(blocks, count, bench.substeps))
    figures = {
        **header("benchmarks.throughput"),
        "task": config.task,
        "policy": bench.subject.policy,
        "num_blocks": config.num_blocks,
        "block_seconds": config.seconds,
        "num_threads": config.num_threads,
        "substeps": bench.substeps,
        "levels": list(LEVELS),
        "rows": rows,
    }
    print(table(figures))
    path = output / f"throughput_{config.task}.json"
    write_json(path, figures)
    plot(figures, path.with_suffix(".png"))
    print(f"\nwritten to {path} and {path.with_suffix('.png')}")
    if config.gate:
        missed = shortfalls(rows)
        print("gate: " + ("; ".join(missed) or "passed"))
        if missed:
            raise SystemExit(1)


if __name__ == "__main__":
    from experiments.cli import command

    command(Config, main)
