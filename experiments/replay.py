"""Run a recorded physics fault again: the step that failed, from the file that training wrote of it."""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from rlcore.errors import InputError


@dataclass(frozen=True)
class Config:
    """Step once from the state, control and model fields of a recorded fault, and tell what happens.

    Training writes such files to the folder faults of its run directory when an environment goes wrong.
    """

    fault: Annotated[Path, tyro.conf.Positional]
    """A file RUN/faults/*.npz."""
    output: Path | None = None
    """A picture (.png) of the moment before the step; by default none is drawn."""

    def __post_init__(self) -> None:
        if self.output is not None and self.output.suffix != ".png":
            raise InputError(f"output must end in .png, got {self.output} (--output)")


_STATE = ("time", "qpos", "qvel", "act", "warmstart", "sensordata")


def read_fault(path: Path) -> dict[str, Any]:
    """The arrays of a fault file. Raises InputError if it is missing, damaged or no fault."""
    from rlcore.physics.engine import FAULT_NAMES

    if not path.is_file():
        raise InputError(f"fault file {path} does not exist")
    try:
        # Opened here, so that nothing but an archive is read and it is closed whatever happens.
        with path.open("rb") as stream, np.lib.npyio.NpzFile(stream, allow_pickle=False) as file:
            arrays = dict(file)
    except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile) as error:
        raise InputError(f"fault file {path} cannot be read: {error}") from error
    missing = [name for name in (*_STATE, "ctrl", "substeps", "code") if name not in arrays]
    if missing:
        raise InputError(f"{path} is no fault file: it lacks {', '.join(missing)}")
    if any(arrays[name].dtype != np.float64 for name in (*_STATE, "ctrl")):
        raise InputError(f"{path} is no fault file: its state or control is not of float64 numbers")
    if any(arrays[name].shape != () or arrays[name].dtype.kind not in "iu" for name in ("substeps", "code")):
        raise InputError(f"{path} is no fault file: its substeps or code is no integer")
    if not 0 <= int(arrays["code"]) < len(FAULT_NAMES):
        raise InputError(f"{path} is no fault file of this version: it has the code {int(arrays['code'])}")
    return arrays


def _check_sizes(arrays: dict[str, Any], model: Any, what: str) -> None:
    """Raise InputError unless the arrays are of one robot of this model."""
    sizes = {"time": (), "qpos": (model.nq,), "qvel": (model.nv,), "act": (model.na,), "warmstart": (model.nv,)}
    sizes |= {"sensordata": (model.nsensor,), "ctrl": (model.nu,), "wrench": (len(model.bodies), 6), "key": (2,)}
    for name, size in sizes.items():
        if name in arrays and arrays[name].shape != size:
            raise InputError(f"{what}: {name} has shape {arrays[name].shape} there and {size} in the model")


def main(config: Config) -> None:
    """Replay a fault on the engine of its run and report."""
    from experiments.cli import load_run, writable

    arrays = read_fault(config.fault)
    run_dir = config.fault.resolve().parent.parent
    output = None if config.output is None else writable(config.output, run_dir)
    run = load_run(run_dir)
    try:
        _replay(config, arrays, output, run.experiment.evaluation_env.engine, run_dir)
    finally:
        if run.experiment.close is not None:
            run.experiment.close()


def _replay(config: Config, arrays: dict[str, Any], output: Path | None, engine: Any, run_dir: Path) -> None:
    import torch

    from rlcore.physics.engine import FAULT_NAMES, PhysicsState, drain_faults

    tensors = {name: torch.from_numpy(value) for name, value in arrays.items() if value.dtype.kind in "fi"}
    _check_sizes(arrays, engine.model, f"{config.fault} is not of the model of {run_dir}")
    state = PhysicsState(
        **{name: tensors[name] for name in _STATE},
        fault=torch.zeros((), dtype=torch.int64),
    )
    params = {name.removeprefix("params."): value for name, value in tensors.items() if name.startswith("params.")}
    drain_faults()
    after = engine.step(
        params, state, tensors["ctrl"], tensors.get("wrench"), substeps=int(arrays["substeps"]), key=tensors.get("key")
    )
    recorded, now = FAULT_NAMES[int(arrays["code"])], FAULT_NAMES[int(after.fault)]
    print(f"recorded: {recorded}: {arrays.get('message', '')}")
    print(f"replayed: {now}" + "".join(f": {fault.message}" for fault in drain_faults()))
    print(f"time {float(state.time):.3f} s, key {tensors['key'].tolist() if 'key' in tensors else 'none'}")
    fastest = torch.argsort(state.qvel.abs(), descending=True)[:3].tolist()
    print("fastest: " + ", ".join(f"{_dof_name(engine.model, i)} {float(state.qvel[i]):.1f}" for i in fastest))
    if output is not None:
        _picture(engine.mjmodel, state.qpos, output)
        print(f"picture: {output}")
    print("the same fault happens again" if recorded == now else "the fault does not happen again")


def _dof_name(model: Any, dof: int) -> str:
    return next(joint.name or joint.kind for joint in model.joints if joint.qvel.start <= dof < joint.qvel.stop)


def _picture(model: Any, qpos: Any, path: Path) -> None:
    from PIL import Image

    from rlcore.video import render_frames

    Image.fromarray(render_frames(model, qpos.unsqueeze(0), camera=-1)[0]).save(path)


if __name__ == "__main__":
    from experiments.cli import command

    command(Config, main)
