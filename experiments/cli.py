"""The command line of an experiment, and the way back from a run on disk to the experiment that made it.

An experiment module has a frozen dataclass `Config`, whose docstring is the help text and which has at least
the fields `seed: int` and `training: TrainingConfig`; a function `build(config) -> Experiment`; and ends with the
lines below. A field `episode_seconds: float` lets evaluation, films and reports choose another length of episodes.

    if __name__ == "__main__":
        run(Config, build)
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import math
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import cattrs
import cattrs.v
import tyro
from cattrs.strategies import configure_union_passthrough

from rlcore import random
from rlcore.errors import EngineFailed, InputError
from rlcore.experiment import Experiment
from rlcore.metrics import TENSORBOARD
from rlcore.run_directory import BEST, CHECKPOINTS, HoldsRuns, RunRecord, read_record, runs_inside
from rlcore.training import TrainingFailed, train

Build = Callable[[Any], Experiment]


def run(config_class: type, build: Build, argv: Sequence[str] | None = None) -> None:
    """Parse the command line, build the experiment, train it.

    With `--training.resume RUN`, fields that are not given have the values that RUN was started with, and
    only those of `training`, and those that say where to simulate, may be given others. A field that was not there
    when RUN was started may be given, too; a warning names it and its value. The exit code is 2 for a mistake in the
    input, with one line on standard error and nothing left behind; 1 if training failed; 130 after Ctrl-C outside
    the training loop. A run that Ctrl-C ended with a checkpoint leaves with 0.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _run(config_class, build, arguments)
    except HoldsRuns as error:
        _leave(2, f"{error}{_with_newest(_program(build), arguments, error)}")
    except InputError as error:
        _leave(2, str(error))
    except (TrainingFailed, EngineFailed) as error:
        _leave(1, str(error))
    except KeyboardInterrupt:
        _leave(130, "interrupted")


def command(config_class: type, main: Callable[[Any], None], argv: Sequence[str] | None = None) -> None:
    """Parse the command line of a program that trains nothing and call `main(config)`; exit codes as in `run`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    program = _program(main)
    try:
        main(parse(config_class, arguments, program))
    except HoldsRuns as error:
        _leave(2, f"{error}{_with_newest(program, arguments, error)}")
    except InputError as error:
        _leave(2, str(error))
    except EngineFailed as error:
        _leave(1, str(error))
    except OSError as error:
        what = f"{error.filename or 'a file'} cannot be read or written: {error.strerror}"
        _leave(1, str(error) if error.strerror is None else what)
    except KeyboardInterrupt:
        _leave(130, "interrupted")


def writable(path: Path, run_dir: Path) -> Path:
    """`path`, once it is sure that a file can be written there.

    Raises:
      InputError: if `run_dir` is not a run, or the folder of `path` does not exist or refuses files.
    """
    read_record(run_dir)
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error} (--output)") from error
    if path.is_dir():
        raise InputError(f"{path} is a directory, not a file to write (--output)")
    return path


def flags_among(arguments: Sequence[str], prefixes: tuple[str, ...]) -> list[str]:
    """The flags in a command line, however their values are given, that begin with one of these."""
    return sorted({flag for argument in arguments if (flag := argument.partition("=")[0]).startswith(prefixes)})


@contextlib.contextmanager
def progress_line() -> Iterator[Callable[[str], None]]:
    """A line on standard error that is written over as work goes on; silent where that is no terminal."""
    live = sys.stderr.isatty()

    def tell(text: str) -> None:
        if live:
            width = shutil.get_terminal_size().columns - 1  # a line that is broken cannot be written over
            print(f"\r\x1b[K{text[:width]}", end="", file=sys.stderr, flush=True)

    try:
        yield tell
    finally:
        if live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _run(config_class: type, build: Build, argv: list[str]) -> None:
    module, file = _origin(build)
    command = _program(build)
    saved, resume, unsaid = None, _resume_argument(argv), list[str]()
    if resume is not None:
        old = read_record(resume)
        whole = resume.resolve().parent
        if _is_population(whole):
            alone = whole.parent / f"{whole.name}-{resume.resolve().name}"
            raise InputError(
                f"{resume} is a member of the population {whole} and goes on with it: {read_record(whole)['command']} "
                f"--training.resume {shlex.quote(str(whole))}; to go on with it alone, copy it first: cp -r "
                f"{shlex.quote(str(resume.resolve()))} {shlex.quote(str(alone))} (--training.resume)"
            )
        if old["module"] != module:
            raise InputError(f"{resume} is a run of {old['module']}, not of {module} (--training.resume)")
        saved = _config_from_json(config_class, old["config"], resume)
        training = dataclasses.replace(saved.training, resume=resume, run_dir=None)
        saved = dataclasses.replace(saved, training=training)
        unsaid = _unsaid(old["config"], to_json(saved))
    config = parse(config_class, argv, command, saved)
    if saved is not None:
        given = to_json(config)
        _refuse_changes(to_json(saved), given, unsaid)
        # An empty table, such as no other reward weights, is nothing to go on with.
        told = [(path, now) for path in unsaid if (now := _at_path(given, path)) != {}]
        if told:
            values = ", ".join(f"{_flag(path)} {_as_typed(now)}" for path, now in told)
            _warn(f"{resume} is from before these settings were there, and goes on with {values}")
    isaacgym = getattr(config, "isaacgym", None)
    if isaacgym is not None and config.physics != "isaacgym" and isaacgym != type(isaacgym)():
        _warn(f"settings of Isaac Gym (--isaacgym.*) say nothing with physics {config.physics} (--physics isaacgym)")
    record = RunRecord(
        experiment=module.rsplit(".", 1)[-1],
        module=module,
        file=None if file is None else str(file),
        command=command,
        seed=config.seed,
        config=to_json(config),
    )
    with on_device_of(config):
        experiment = build(config)
        if experiment.note is not None:
            print(experiment.note(), flush=True)
        try:
            result = train(
                experiment,
                config.training,
                key=random.key(config.seed),
                record=record,
                render=experiment.render,
                faults=experiment.faults,
            )
            if experiment.summary is not None and (text := experiment.summary()):
                print(text)
            if result.stopped == "iterations":
                print("next:")
                for line in _what_next(experiment.evaluation_env, result.run_dir, config.training.tensorboard):
                    print(f"  {line}")
        finally:
            if experiment.close is not None:
                experiment.close()


def _is_population(path: Path) -> bool:
    with contextlib.suppress(InputError):
        return bool(read_record(path)["module"] == "experiments.population")
    return False


def _what_next(env: Any, run_dir: Path, tensorboard: bool) -> list[str]:
    """The commands that show what a finished run has learned."""
    from experiments.report import lacking

    programs = ["play", "evaluate"]
    if env is not None and not lacking(env):
        programs.append("report")
    # A population has a run for each member, and is none that acts itself.
    acting = run_dir / BEST if (run_dir / BEST).exists() else run_dir
    python, place = interpreter(), shlex.quote(str(acting))
    lines = [f"{python} -m experiments.{program} {place}" for program in programs]
    if tensorboard:
        install = "" if importlib.util.find_spec("tensorboard") else f"{python} -m pip install tensorboard && "
        lines.append(f"{install}{python} -m tensorboard.main --logdir {shlex.quote(str(run_dir / TENSORBOARD))}")
    return lines


@contextlib.contextmanager
def on_device_of(config: Any) -> Iterator[None]:
    """Put new tensors where the physics that a configuration chooses has its states: constants, networks and all.

    Raises:
      InputError: if that engine cannot run here.
    """
    # Engines take a moment to import, which --help does not need.
    from rlcore.physics.engines import check_available, choose, device_of
    from rlcore.physics.isaacgym_settings import Settings

    physics = choose(getattr(config, "physics", "mujoco"), getattr(config, "isaacgym", Settings()))
    check_available(physics)
    device = device_of(physics)
    # The CPU is where tensors are without being told, and telling costs a little at each call.
    with contextlib.nullcontext() if device.type == "cpu" else device:
        yield


def interpreter() -> str:
    """This interpreter, as it can be typed here: its path from the working directory if it is inside."""
    if not sys.executable:
        return "python"
    try:
        inside = str(Path(sys.executable).relative_to(Path.cwd()))
    except ValueError:
        return shlex.quote(sys.executable)
    return shlex.quote(inside if os.sep in inside else f"./{inside}")


def _program(main: Callable[..., Any]) -> str:
    """How to run the program whose function this is."""
    module, file = _origin(main)
    return f"{interpreter()} -m {module}" if file is None else f"{interpreter()} {shlex.quote(str(file))}"


def _with_newest(program: str, argv: Sequence[str], error: HoldsRuns) -> str:
    """The same command line with the newest run in place of the folder that holds it; empty if it is not there."""
    changed = []
    for argument in argv:
        flag, equals, value = argument.rpartition("=")
        changed.append(f"{flag}{equals}{error.newest}" if Path(value) == error.path else argument)
    return "" if changed == [*argv] else f"; for the newest: {program} {shlex.join(changed)}"


def _leave(code: int, message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(code)


def _origin(build: Callable[..., Any]) -> tuple[str, Path | None]:
    """The module that `build` is from; and its file, unless importing by that name finds it."""
    module = sys.modules[build.__module__]
    spec = getattr(module, "__spec__", None)
    if spec is not None:
        return spec.name, None
    file = Path(str(module.__file__)).resolve()
    return file.stem, file


def _resume_argument(argv: Sequence[str]) -> Path | None:
    """The run to resume, looked up before the command line can be parsed: it decides the defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--training.resume", dest="resume")
    with contextlib.suppress(argparse.ArgumentError):
        value = parser.parse_known_args(argv)[0].resume
        return None if value in (None, "None") else Path(value)
    return None


def parse(config_class: type, argv: Sequence[str], command: str, saved: Any = None) -> Any:
    """Parse with tyro. What it reports of a mistake in a box is told in one line, as are our own InputErrors."""
    complaints = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaints):
            if saved is None:
                return tyro.cli(config_class, args=argv, prog=command)
            return tyro.cli(config_class, args=argv, prog=command, default=saved)
    except SystemExit as stop:
        cause: BaseException | None = stop
        while cause is not None:
            if isinstance(cause, InputError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        if stop.code and (complaint := _in_one_line(complaints.getvalue())):
            raise InputError(f"{complaint} ({command} --help)") from None
        sys.stderr.write(complaints.getvalue())
        raise


def _in_one_line(report: str) -> str:
    """What tyro reports under a title, its parts with semicolons between.

    It draws a box with rules between the parts, or only the rules where a box cannot be shown.
    """
    parts: list[list[str]] = [[]]
    for line in report.splitlines():
        text = line.strip().strip("│").strip()
        if text.startswith(("╭", "╰")) or (text and not text.strip("─-")):
            parts.append([])
        elif text:
            parts[-1].append(text)
    told = [" ".join(part) for part in parts if part]
    if "╭" not in report:
        told = told[1:]  # without the title
    return "; ".join(part for part in told if not part.startswith("For full helptext"))


# Neither how long to train nor where to simulate changes what is trained.
_FREE = (
    *("training", "num_threads"),
    *(f"isaacgym.{name}" for name in ("python", "gpu", "max_gpu_contacts", "start_timeout", "step_timeout")),
)


def _unsaid(record: Mapping[str, Any], config: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Paths of the fields that a recorded configuration says nothing of, as there was no such field then."""
    paths = []
    for name, value in config.items():
        path = f"{prefix}{name}"
        if path in _FREE or (path == "isaacgym" and config.get("physics") != "isaacgym"):
            continue
        old = record.get(name, {})
        if isinstance(value, Mapping) and value and isinstance(old, Mapping):
            paths += _unsaid(old, value, path + ".")
        elif name not in record:
            paths.append(path)
    return paths


def _refuse_changes(
    saved: Mapping[str, Any], given: Mapping[str, Any], unsaid: Collection[str], prefix: str = ""
) -> None:
    """Raise InputError at the first field, but for those of `_FREE` and `unsaid`, that a resume would change."""
    for name, value in given.items():
        old, path = saved.get(name), f"{prefix}{name}"
        if path in (*_FREE, *unsaid) or old == value:
            continue
        if isinstance(old, Mapping) and isinstance(value, Mapping) and old.keys() == value.keys():
            _refuse_changes(old, value, unsaid, path + ".")
            continue
        raise InputError(
            f"{path} was {old!r} in the run to resume and cannot become {value!r} ({_flag(path)}): leave it out, or "
            "start a new run"
        )


def _flag(path: str) -> str:
    return "--" + path.replace("_", "-")


def _as_typed(value: Any) -> str:
    """A setting's value as it is given on the command line, where it is a table."""
    return " ".join(f"{key} {x}" for key, x in value.items()) if isinstance(value, Mapping) else str(value)


def _at_path(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = config[name]
    return config


def _converter() -> cattrs.Converter:
    """Configurations as JSON and back; strict, since a field misread would train something else."""
    converter = cattrs.Converter(forbid_extra_keys=True)
    # JSON has no infinity and no NaN: they are strings, which float() reads.
    converter.register_unstructure_hook(float, lambda x: x if math.isfinite(x) else str(x))
    converter.register_unstructure_hook(Path, str)

    def exactly(kind: type) -> Callable[[Any, Any], Any]:
        def structure(value: Any, _: Any) -> Any:
            if type(value) is not kind:
                raise InputError(f"{value!r} is not of type {kind.__name__}")
            return value

        return structure

    def number(value: Any, _: Any) -> float:
        if isinstance(value, bool) or (isinstance(value, str) and math.isfinite(float(value))):
            raise InputError(f"{value!r} is not of type float")
        return float(value)

    for kind in (bool, int, str):
        converter.register_structure_hook(kind, exactly(kind))
    converter.register_structure_hook(float, number)
    configure_union_passthrough(bool | int | float | str | None, converter)
    return converter


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as JSON values."""
    return _converter().unstructure(config)


def _config_from_json(config_class: type, values: Any, run_dir: Path) -> Any:
    def tell(error: BaseException, expected: type | None) -> str:
        return str(error) if isinstance(error, InputError) else cattrs.v.format_exception(error, expected)

    try:
        return _converter().structure(values, config_class)
    except cattrs.BaseValidationError as error:
        faults = "; ".join(cattrs.transform_error(error, path="config", format_exception=tell))
        raise InputError(f"the configuration in {run_dir} does not fit this version: {faults}") from error


class Run(NamedTuple):
    """A run on disk, built again."""

    run_dir: Path
    module: ModuleType
    config: Any
    experiment: Experiment


class Policy(NamedTuple):
    """A policy from a checkpoint, and what it came from."""

    act: Callable[..., Any]
    """`(obs, key=None) -> action`, batched over the leading axis; deterministic without a key."""
    state: Any
    """The whole TrainState."""
    iteration: int
    run: Run
    note: str | None = None
    """What a person should know of how this checkpoint was chosen."""


def load_run(run_dir: Path, overrides: Mapping[str, Any] | None = None) -> Run:
    """Import a run's experiment module and build its experiment as it was, but with physics on CPUs.

    Whatever simulated in training, the state has the same form, and what is looked at is the same model.

    Args:
      run_dir: as training left it.
      overrides: fields to change first, by path: `{"num_envs": 1}`, `{"task.engine": "mujoco"}`.

    Raises:
      InputError: if `run_dir` is not a run or a population, its module is gone, or its configuration no longer fits.
    """
    record = read_record(run_dir)
    if members := runs_inside(run_dir):
        one = run_dir / BEST if (run_dir / BEST).exists() else members[0]
        raise InputError(f"{run_dir} is a population of {len(members)} runs: name one of them, as {one}")
    module = _import(record["module"], record["file"], run_dir)
    for name in ("Config", "build"):
        if not hasattr(module, name):
            raise InputError(f"{run_dir} is a run of {record['module']}, which has no {name}")
    config = _config_from_json(module.Config, record["config"], run_dir)
    changes = dict(overrides or {})
    if hasattr(config, "physics"):
        changes.setdefault("physics", "mujoco")
    for path, value in changes.items():
        config = _replaced(config, path.split("."), value, path)
    return Run(run_dir, module, config, module.build(config))


def restore_policy(run: Run | Path, which: str | int = "best", fresh: Collection[str] = ()) -> Policy:
    """A run's policy from one of its checkpoints, which are only read.

    Args:
      run: its directory, or what `load_run` gave.
      which: `best`, `last`, or the iteration of a checkpoint.
      fresh: top-level fields of the TrainState to take from `algorithm.init` instead, such as environment
        states whose number an override changed. A replay buffer, which no policy needs, is always one of them.

    Raises:
      InputError: if there is no such checkpoint, or it is damaged or does not fit.
    """
    from rlcore.checkpoint import Checkpointer

    if not isinstance(run, Run):
        run = load_run(run)
    record = read_record(run.run_dir)
    algorithm = run.experiment.algorithm
    target = algorithm.init(random.key(run.config.seed))
    identity = {"experiment": record["experiment"]}
    checkpoints = Checkpointer(run.run_dir / CHECKPOINTS, identity, read_only=True, warn=_warn)
    try:
        steps = {"best": checkpoints.best_step(), "last": max(checkpoints.steps(), default=None)}
        step = steps.get(which, which) if isinstance(which, str) else which
        if step is None:
            raise InputError(f"{run.run_dir} has no checkpoint")
        if isinstance(step, str) and not step.isdecimal():
            raise InputError(f"checkpoint must be best, last or an iteration, got {which!r}")
        state = checkpoints.restore(int(step), target, {*fresh, "replay"})
        merely_newest = which == "best" and checkpoints.score(int(step)) is None
    finally:
        checkpoints.close()
    note = None
    if merely_newest:
        metric = run.config.training.best_metric or run.experiment.best_metric
        note = f"no checkpoint has a value of {metric}: the best is merely the newest"
    return Policy(lambda obs, key=None: algorithm.act(state, obs, key), state, int(step), run, note)


def _import(name: str, file: str | None, run_dir: Path) -> ModuleType:
    try:
        if file is None:
            return importlib.import_module(name)
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise ImportError(f"{file} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        # Dataclasses look their module up by name while they are defined.
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module
    except (ImportError, OSError) as error:
        raise InputError(f"{run_dir} is a run of {name}, which cannot be imported: {error}") from error


def _replaced(config: Any, path: Sequence[str], value: Any, whole: str) -> Any:
    if not any(field.name == path[0] for field in dataclasses.fields(config)):
        if whole == "episode_seconds":
            raise InputError("episodes of this experiment have one length, which cannot be chosen (--seconds)")
        raise InputError(f"the configuration has no field {whole}")
    if path[1:]:
        value = _replaced(getattr(config, path[0]), path[1:], value, whole)
    return dataclasses.replace(config, **{path[0]: value})


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
