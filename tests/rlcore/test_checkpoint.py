import shutil
import subprocess
import sys

import pytest
import torch

from rlcore.checkpoint import Checkpointer, CheckpointError, DamagedCheckpoint, tree_bytes
from rlcore.errors import InputError
from rlcore.tree import map_leaves, named_leaves, pytree

IDENTITY = {"experiment": "walk"}


@pytree
class State:
    params: dict
    iteration: torch.Tensor


def bits(leaf):
    return leaf.resolve_conj().reshape(-1).view(torch.uint8)


def assert_same_bits(a, b):
    for (name, x), (other, y) in zip(named_leaves(a), named_leaves(b), strict=True):
        assert (name, x.dtype, x.shape) == (other, y.dtype, y.shape)
        assert torch.equal(bits(x), bits(y)), name


def example(seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Two NaNs with payloads of their own, a negative zero, the smallest subnormal.
    words = torch.tensor([0x7FF8000000001234, -0x000FFFFFFFFFFFFF, -(2**63), 1])
    params = {
        "float64": words.view(torch.float64),
        "float32": torch.randn(5, 3, generator=generator),
        "float16": torch.randn(4, generator=generator).half(),
        "bfloat16": torch.randn(4, 2, generator=generator).bfloat16(),
        "float8": torch.randn(3, generator=generator).to(torch.float8_e4m3fn),
        "complex64": torch.randn(2, dtype=torch.complex64, generator=generator).conj(),
        "int64": torch.tensor([2**63 - 1, -(2**63)]),
        "int32": torch.tensor(-5, dtype=torch.int32),
        "uint8": torch.arange(3, dtype=torch.uint8),
        "bool": torch.tensor(True),
        "zeros": -torch.zeros(6, dtype=torch.float64),
        "empty": torch.zeros(4, 0),
        "strided": torch.randn(3, 5, generator=generator).T,
        "expanded": torch.ones(1, 2).expand(3, 2),
        "a.dotted/name": torch.ones(2),
    }
    return State(params=params, iteration=torch.tensor(7))


def zeros_like(tree):
    return map_leaves(lambda leaf: torch.zeros(leaf.shape, dtype=leaf.dtype), tree)


def saved(directory, steps=(1, 2), **kwargs):
    checkpoints = Checkpointer(directory, IDENTITY, **kwargs)
    for step in steps:
        checkpoints.save(step, example(step), score=step)
    checkpoints.close()
    return directory


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    directory = saved(tmp_path / "checkpoints", steps=[3])
    restored, step = Checkpointer(directory, IDENTITY).restore_latest(zeros_like(example()))
    assert step == 3
    assert_same_bits(restored, example(3))


def test_writing_into_a_tensor_after_save_does_not_change_the_checkpoint(tmp_path):
    checkpoints = Checkpointer(tmp_path / "checkpoints", IDENTITY)
    tree = {"x": torch.zeros(1_000_000)}
    checkpoints.save(1, tree)
    tree["x"].fill_(9.0)
    checkpoints.wait()
    assert not checkpoints.restore(1, tree)["x"].any()
    checkpoints.close()


def test_keeps_the_newest_and_the_best(tmp_path):
    directory = tmp_path / "checkpoints"
    checkpoints = Checkpointer(directory, IDENTITY, keep_last=2)
    for step, score in enumerate([1.0, 8.0, float("nan"), None, 3.0], start=1):
        checkpoints.save(step, {"x": torch.tensor(step)}, score)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best_step() == 2
    checkpoints.close()
    again = Checkpointer(directory, IDENTITY, keep_last=2)
    again.save(6, {"x": torch.tensor(6)}, 4.0)
    again.wait()
    assert again.steps() == [2, 5, 6]
    best, step = again.restore_best({"x": torch.tensor(0)})
    assert (step, best["x"].item()) == (2, 2)


def test_without_scores_the_best_is_the_newest(tmp_path):
    checkpoints = Checkpointer(tmp_path / "checkpoints", IDENTITY)
    assert checkpoints.best_step() is None
    checkpoints.save(1, {"x": torch.tensor(1)})
    checkpoints.save(2, {"x": torch.tensor(2)})
    checkpoints.wait()
    assert checkpoints.best_step() == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: p | {"float32": torch.zeros(9, 3)},
            "params.float32 is [5, 3] in the checkpoint but [9, 3] here",
        ),
        (lambda p: p | {"bool": torch.tensor(1)}, "params.bool is bool in the checkpoint but int64 here"),
        (lambda p: p | {"more": torch.zeros(1)}, "lacks what is needed here: params.more"),
        (lambda p: {k: v for k, v in p.items() if k != "bool"}, "has what is unknown here: params.bool"),
    ],
)
def test_a_tree_that_does_not_fit_is_refused_by_name(tmp_path, change, message):
    directory = saved(tmp_path / "checkpoints")
    target = State(params=change(example().params), iteration=torch.tensor(0))
    with pytest.raises(InputError) as caught:
        Checkpointer(directory, IDENTITY).restore_latest(target)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "damaged-checkpoints").exists()


def test_fresh_fields_come_from_the_target(tmp_path):
    directory = saved(tmp_path / "checkpoints", steps=[1])
    target = State(params={"other": torch.ones(2)}, iteration=torch.tensor(0))
    restored = Checkpointer(directory, IDENTITY).restore(1, target, fresh=("params",))
    assert restored.params["other"] is target.params["other"]
    assert restored.iteration.item() == 7


def test_another_experiments_checkpoint_is_refused(tmp_path):
    directory = saved(tmp_path / "checkpoints")
    with pytest.raises(InputError, match="belongs to experiment 'walk', not 'run'"):
        Checkpointer(directory, {"experiment": "run"}).restore(1, example())


def test_missing_checkpoints_are_named(tmp_path):
    with pytest.raises(InputError, match=r"has no checkpoint$"):
        Checkpointer(tmp_path / "checkpoints", IDENTITY).restore_latest(example())
    directory = saved(tmp_path / "others")
    with pytest.raises(InputError, match=r"no checkpoint of iteration 5 \(there are: 1, 2\)"):
        Checkpointer(directory, IDENTITY).restore(5, example())
    with pytest.raises(InputError, match="is not a directory of checkpoints"):
        Checkpointer(tmp_path / "none", IDENTITY, read_only=True)
    assert not (tmp_path / "none").exists()


def test_a_foreign_checkpoint_is_refused(tmp_path):
    directory = tmp_path / "checkpoints"
    (directory / "5").mkdir(parents=True)
    (directory / "5" / "model.pt").write_bytes(b"other")
    with pytest.raises(DamagedCheckpoint, match="5 is damaged or not rlcore's"):
        Checkpointer(directory, IDENTITY).restore_latest(example())


def damages():
    yield "cut", lambda path: path.write_bytes(b"")
    yield "half", lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    yield "gone", lambda path: path.unlink()

    def flip(path):
        content = bytearray(path.read_bytes())
        if content:
            content[len(content) // 2] ^= 0x55
        path.write_bytes(content)

    yield "flipped", flip


@pytest.mark.parametrize("name", [name for name, _ in damages()])
def test_whichever_file_is_damaged_no_wrong_bit_is_restored(tmp_path, name, capfd):
    damage = dict(damages())[name]
    pristine = saved(tmp_path / "pristine")
    files = [f.relative_to(pristine) for f in sorted((pristine / "2").rglob("*")) if f.is_file()]
    steps = []
    for number, file in enumerate(files):
        directory = tmp_path / f"run{number}" / "checkpoints"
        shutil.copytree(pristine, directory)
        damage(directory / file)
        warnings: list[str] = []
        checkpoints = Checkpointer(directory, IDENTITY, warn=warnings.append)
        restored, step = checkpoints.restore_latest(zeros_like(example()))
        assert_same_bits(restored, example(step))
        steps.append(step)
        assert len(warnings) == (step == 1)
        assert checkpoints.steps() == ([1] if step == 1 else [1, 2])
        assert (directory.parent / "damaged-checkpoints" / "2-0").exists() == (step == 1)
        if step == 1:
            assert "going back to iteration 1" in warnings[0]
            assert "\n" not in warnings[0]
            checkpoints.save(2, example(2))
            checkpoints.wait()
            assert checkpoints.restore_latest(example())[1] == 2
        checkpoints.close()
    # The manifest and the values, at least, are files that matter.
    assert steps.count(1) >= 3
    assert "Traceback" not in capfd.readouterr().err


def test_reading_only_moves_and_deletes_nothing(tmp_path):
    directory = saved(tmp_path / "checkpoints")
    next((directory / "2" / "manifest").glob("metadata")).write_text("{")
    (directory / "9.orbax-checkpoint-tmp").mkdir()
    before = sorted(tmp_path.rglob("*"))
    checkpoints = Checkpointer(directory, IDENTITY, read_only=True, warn=lambda text: None)
    assert checkpoints.restore_latest(example())[1] == 1
    checkpoints.close()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_place_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="checkpoints cannot be kept in"):
        Checkpointer(tmp_path / "file" / "checkpoints", IDENTITY)


def test_tree_bytes():
    # 3 * 8 + 2 * 4 + 1
    assert tree_bytes({"a": torch.zeros(3, dtype=torch.float64), "b": torch.zeros(2), "c": torch.tensor(True)}) == 33


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_told_and_earlier_checkpoints_stay(small_disk):
    directory = small_disk / "checkpoints"
    generator = torch.Generator().manual_seed(0)
    tree = {"x": torch.randn(300_000, generator=generator)}
    checkpoints = Checkpointer(directory, IDENTITY, keep_last=5)
    checkpoints.save(1, tree)
    checkpoints.save(2, tree)
    checkpoints.wait()
    checkpoints.save(3, tree)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.wait()
    assert "No space left" in str(caught.value)
    assert "newest good one is 2" in str(caught.value)
    assert checkpoints.steps() == [1, 2]
    # With space again, it goes on as if nothing had been.
    shutil.rmtree(directory / "1")
    checkpoints.close()
    again = Checkpointer(directory, IDENTITY, keep_last=5)
    again.save(4, tree)
    again.wait()
    restored, step = again.restore_latest({"x": torch.zeros(300_000)})
    assert step == 4
    assert_same_bits(restored, tree)
    again.close()


def test_importing_is_light():
    heavy = "{'jax', 'orbax', 'matplotlib', 'tensorboardX', 'imageio', 'imageio_ffmpeg', 'mujoco', 'google.protobuf'}"
    code = f"import sys, rlcore.training, rlcore.checkpoint; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
