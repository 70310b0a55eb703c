"""A stand-in for NVIDIA's package of this name, backed by MuJoCo: for tests, where the real one cannot be installed.

It has the part of the interface that rlcore's server uses, with the real signatures (a test compares them), and raises
where the real one would misbehave silently: that is `gymapi.RuleBroken`. It is run by whichever Python has MuJoCo
and torch, Python 3.8 included, and is chosen by PYTHONPATH. What it does differently on purpose from
one case to the next is told by environment variables:

- ISAACGYM_STANDIN_FAULT: `crash:N`, `hang:N`, `overflow:N` (of memory for contacts) at the N-th simulate, or `no_sim`.
- ISAACGYM_STANDIN_DEVICE: `twin` has the GPU pipeline without a GPU, its tensors on the CPU; else it needs CUDA.
- ISAACGYM_STANDIN_VELOCITY: `com` (default) or `origin`, the point of bodies that linear velocities are of.
- ISAACGYM_STANDIN_CALLS: a file to which the name of each call of a setter or simulate is appended, after the pipeline
  and the memory for contacts.
"""

import os
import sys

if "torch" in sys.modules:
    raise ImportError("torch was imported before isaacgym")

if os.environ.get("ISAACGYM_STANDIN_DEVICE") == "twin":
    import device_twin

    # The program that imports this is rlcore's server.
    sys.modules["__main__"].CudaMemory = device_twin.DeviceTwin
