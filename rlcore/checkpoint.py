"""Checkpoints: a tree of tensors on disk and back, bit for bit.

Orbax writes in the background into a temporary directory and renames it when it is complete, so a process
killed at any moment leaves each earlier checkpoint as it was. Leaves are stored as numpy arrays under their
paths. Beside them stands a manifest in JSON: the iteration, whose run this is, and each leaf's shape, dtype
and checksum, so that a damaged file is noticed and never trained on.

`save` copies the tree before it returns, so the caller may go on and even write into its tensors. This
module never looks inside a state: it knows names, shapes and bits. Outside itself it changes what orbax says
twice: absl logs fatal errors only, and tracebacks of a closed event loop are dropped.
"""

import contextlib
import functools
import logging
import math
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rlcore import manifest
from rlcore.errors import InputError
from rlcore.tree import named_leaves, tree_flatten, tree_unflatten

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written. Those written earlier are unharmed."""


class DamagedCheckpoint(InputError):
    """A checkpoint whose files are missing, cut short or altered."""


def tree_bytes(tree: Any) -> int:
    """Bytes of all leaves: about what a checkpoint of `tree` takes on disk before compression."""
    return sum(leaf.numel() * leaf.element_size() for _, leaf in named_leaves(tree))


class Checkpointer:
    """The checkpoints of one run.

    Args:
      directory: where they are kept, one folder an iteration. It is made if missing, unless `read_only`.
      identity: what the checkpoints belong to, such as `{"experiment": "g1_walk"}`. It is stored, and a
        checkpoint with another identity is refused.
      keep_last: how many of the newest to keep. The one with the highest score is kept besides.
      read_only: look, and neither make, move nor delete anything.
      warn: called with one line when a damaged checkpoint is passed over.

    Raises:
      InputError: if the directory is missing or cannot be made or read.
    """

    def __init__(
        self,
        directory: Path,
        identity: Mapping[str, str],
        *,
        keep_last: int = 3,
        read_only: bool = False,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.directory = Path(directory).absolute()
        self._identity = dict(identity)
        self._keep_last = keep_last
        self._read_only = read_only
        self._warn = warn
        self._pending: int | None = None
        if read_only and not self.directory.is_dir():
            raise InputError(f"{directory} is not a directory of checkpoints")
        try:
            self._manager = self._open()
        except (OSError, ValueError) as error:
            raise InputError(f"checkpoints cannot be kept in {directory}: {_first_line(error)}") from error

    def _open(self) -> Any:
        ocp = _orbax()
        policies = ocp.checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(self._keep_last), _Best(self)]),
            cleanup_tmp_directories=not self._read_only,
            read_only=self._read_only,
        )
        manager = ocp.CheckpointManager(self.directory, options=options, item_names=("state", "manifest"))
        # Scores live in the manifest: orbax's own record of metrics stops it from opening once it is damaged.
        self._scores: dict[int, float] = {}
        for step in manager.all_steps():
            with contextlib.suppress(Exception):
                if (score := self._manifest(manager, step)["score"]) is not None:
                    self._scores[step] = score
        return manager

    def _manifest(self, manager: Any, step: int) -> dict[str, Any]:
        args = _orbax().args
        stored = manager.restore(step, args=args.Composite(manifest=args.JsonRestore()))["manifest"]
        return manifest.checked(stored)

    def steps(self) -> list[int]:
        """The iterations that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def score(self, step: int) -> float | None:
        """The score that a checkpoint was saved with."""
        return self._scores.get(step)

    def best_step(self) -> int | None:
        """The iteration with the highest score, or the newest one while none has a score."""
        steps = self.steps()
        return max(steps, key=lambda step: (self._scores.get(step, -math.inf), step), default=None)

    def save(self, iteration: int, tree: Any, score: float | None = None) -> None:
        """Begin to write `tree`; it is copied before this returns. Nothing happens if it is there already.

        Args:
          iteration: the checkpoint's name, counted up.
          tree: tensors on any device.
          score: higher is better; None and NaN mean unknown.

        Raises:
          CheckpointError: if this could not be begun, or if the save before it failed; in that case this one
            was begun all the same.
        """
        earlier = None
        try:
            self.wait()
        except CheckpointError as error:
            earlier = error
        if iteration in self._manager.all_steps():
            return
        arrays = {name: manifest.to_numpy(name, leaf) for name, leaf in named_leaves(tree)}
        score = score if score is not None and math.isfinite(score) else None
        header = {"iteration": iteration, "identity": self._identity, "score": score}
        if score is not None:
            self._scores[iteration] = score
        args = _orbax().args
        self._pending = iteration
        try:
            self._manager.save(
                iteration,
                # Orbax refuses arrays without elements; the manifest has all there is to know about them.
                args=args.Composite(
                    state=args.PyTreeSave({name: array for name, array in arrays.items() if array.size}),
                    manifest=args.JsonSave(manifest.describe(header, tree, arrays)),
                ),
                force=True,
            )
        except Exception as error:
            raise self._failed(error) from error
        if earlier is not None:
            raise earlier

    def wait(self) -> None:
        """Wait until the last save is on disk.

        Raises:
          CheckpointError: if it failed. The checkpointer can be used again.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error
        self._pending = None

    def _failed(self, error: Exception) -> CheckpointError:
        iteration, self._pending = self._pending, None
        # The manager still counts what it meant to delete as deleted. A new one looks at the disk.
        self._manager = self._open()
        newest = max(self.steps(), default=None)
        kept = "there is no earlier one" if newest is None else f"the newest good one is {newest}"
        return CheckpointError(
            f"the checkpoint of iteration {iteration} could not be written to {self.directory}, and {kept}: "
            + _first_line(error)
        )

    def restore(self, step: int, target: T, fresh: Collection[str] = ()) -> T:
        """The checkpoint of iteration `step`, in `target`'s structure and on its leaves' devices.

        Args:
          target: a tree of the same structure, shapes and dtypes; its values are not used.
          fresh: top-level fields to take from `target` instead, whatever the checkpoint has for them.

        Raises:
          DamagedCheckpoint: if files are missing, cut short or altered.
          InputError: if there is no such checkpoint, or it belongs to something else, or does not fit.
        """
        where = self.directory / str(step)
        if step not in self._manager.all_steps():
            have = ", ".join(map(str, self.steps())) or "none"
            raise InputError(f"{self.directory} has no checkpoint of iteration {step} (there are: {have})")
        args = _orbax().args
        try:
            stored = self._manifest(self._manager, step)
        except Exception as error:
            raise DamagedCheckpoint(f"{where} is damaged or not rlcore's: {_first_line(error)}") from error
        for name, value in self._identity.items():
            if (there := stored["identity"].get(name)) != value:
                raise InputError(f"{where} belongs to {name} {there!r}, not {value!r}")
        leaves = {n: leaf for n, leaf in stored["leaves"].items() if n.split(".")[0] not in fresh}
        wanted = {n: leaf for n, leaf in named_leaves(target) if n.split(".")[0] not in fresh}
        manifest.check_fit(where, leaves, wanted)
        try:
            arrays = self._manager.restore(step, args=args.Composite(state=args.PyTreeRestore()))["state"]
            restored = {
                name: manifest.from_numpy(name, arrays.get(name), leaves[name], leaf) for name, leaf in wanted.items()
            }
        except Exception as error:
            raise DamagedCheckpoint(f"{where} is damaged: {_first_line(error)}") from error
        _, structure = tree_flatten(target)
        return tree_unflatten([restored.get(name, leaf) for name, leaf in named_leaves(target)], structure)

    def restore_latest(self, target: T) -> tuple[T, int]:
        """The newest checkpoint that can be read, and its iteration.

        Damaged ones are passed over with a warning. Unless `read_only`, they are moved to the directory
        `damaged-checkpoints` beside this one, since training will come by the same iterations again.

        Raises:
          InputError: if none can be read, or the newest readable one does not fit.
        """
        damaged: list[tuple[int, DamagedCheckpoint]] = []
        for step in reversed(self.steps()):
            try:
                state = self.restore(step, target)
            except DamagedCheckpoint as error:
                damaged.append((step, error))
                continue
            for number, reason in damaged:
                self._warn(f"{reason}; going back to iteration {step}")
                self._set_aside(number)
            return state, step
        if damaged:
            raise damaged[0][1]
        raise InputError(f"{self.directory} has no checkpoint")

    def restore_best(self, target: T, fresh: Collection[str] = ()) -> tuple[T, int]:
        """The checkpoint with the highest score, and its iteration; raises as `restore` does."""
        step = self.best_step()
        if step is None:
            raise InputError(f"{self.directory} has no checkpoint")
        return self.restore(step, target, fresh), step

    def _set_aside(self, step: int) -> None:
        if self._read_only:
            return
        aside = self.directory.parent / "damaged-checkpoints"
        aside.mkdir(exist_ok=True)
        number = 0
        while (place := aside / f"{step}-{number}").exists():
            number += 1
        (self.directory / str(step)).rename(place)
        self._manager.close()
        self._manager = self._open()

    def close(self) -> None:
        """Wait for the last save and free what is held; raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._manager.close()


class _Best:
    """Orbax's preservation policy that keeps the checkpoint with the highest score."""

    def __init__(self, checkpointer: Checkpointer) -> None:
        self._checkpointer = checkpointer

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        scores = self._checkpointer._scores
        scored = [(scores[c.step], c.step) for c in checkpoints if c.step in scores]
        return [bool(scored) and c.step == max(scored)[1] for c in checkpoints]


def _orbax() -> Any:
    """Orbax, imported at the first use: it takes a second, and brings jax."""
    if "jax" not in sys.modules:
        import jax

        # Only numpy arrays pass through jax here: keep it from taking an accelerator's memory for itself.
        jax.config.update("jax_platforms", "cpu")
    import orbax.checkpoint

    _hush_stragglers()
    logging.getLogger("absl").setLevel(logging.CRITICAL)

    return orbax.checkpoint


@functools.cache
def _hush_stragglers() -> None:
    """Keep what is left of a failed read or write off the console.

    When one of tensorstore's concurrent operations fails, the others still report to an event loop that is
    closed by then, each with a traceback. The failure itself is raised, and told in one line.
    """
    show = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = hook


def _first_line(error: BaseException) -> str:
    """An exception in one line of bearable length."""
    if "No space left on device" in str(error):
        return "No space left on device"
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= 160 else text[:157] + "..."
