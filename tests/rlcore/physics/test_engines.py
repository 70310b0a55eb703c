"""The choice of an engine by name, and how one is refused that cannot run here."""

import mujoco
import pytest
import torch

from rlcore.errors import InputError
from rlcore.physics import engines
from rlcore.physics.engines import device_of, make_engine
from rlcore.physics.mujoco import MujocoEngine
from tasks.cartpole import MODEL


def test_mujoco_runs_on_cpus():
    engine = make_engine(mujoco.MjModel.from_xml_string(MODEL), 1)
    assert isinstance(engine, MujocoEngine)
    assert engine.device == device_of("mujoco") == torch.device("cpu")


@pytest.mark.parametrize(
    ("installed", "cuda", "words"), [(False, True, r"pip install 'rlcore\[warp\]'"), (True, False, "NVIDIA GPU")]
)
def test_warp_is_refused_in_one_line_where_it_cannot_run(monkeypatch, installed, cuda, words):
    monkeypatch.setattr(engines, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    with pytest.raises(InputError, match=words) as error:
        make_engine(mujoco.MjModel.from_xml_string(MODEL), physics="warp")
    assert "\n" not in str(error.value) and "--physics" in str(error.value)
