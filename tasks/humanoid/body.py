"""The humanoid's model and the heights that its tasks go by; `tasks.walking.make_walker` makes a robot of it."""

from pathlib import Path

MODEL = Path(__file__).parent / "humanoid.xml"
STANDING_HEIGHT = 0.83  # m, pelvis above the floor
FALLEN_HEIGHT = 0.6  # m
