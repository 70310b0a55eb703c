"""rlcore: functional reinforcement learning for robots, in PyTorch."""

import os

# Idle OpenMP threads of torch spin, by default for milliseconds, on the cores that the physics' own threads need.
# This shortens it; it takes effect where rlcore is imported before torch.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
