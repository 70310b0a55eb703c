"""The replay buffer against a list of all that ever happened."""

import pytest
import torch

from rlcore import random, tree
from rlcore.checkpoint import tree_bytes
from rlcore.errors import InputError
from rlcore.replay import replay_add, replay_init, replay_sample

ROBOTS, LENGTH = 3, 5


class History:
    """What robots went through: observation i of robot b is (i, b), and an episode's last one (-i, b)."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.age = torch.zeros(ROBOTS)
        self.count = 0
        self.reward, self.terminated, self.truncated = [], [], []

    def seen(self, i, sign=1):
        return torch.stack([torch.full((ROBOTS,), float(sign * i)), torch.arange(ROBOTS).float()], -1)

    def steps(self, number):
        """The arguments of `replay_add` for so many steps."""
        rows = []
        for _ in range(number):
            i, self.count = self.count, self.count + 1
            self.age += 1
            truncated = self.age >= LENGTH
            terminated = torch.rand(ROBOTS, generator=self.generator) < 0.15
            ended = truncated | terminated
            self.age = torch.where(ended, 0.0, self.age)
            reward = torch.rand(ROBOTS, generator=self.generator)
            self.reward.append(reward)
            self.terminated.append(terminated)
            self.truncated.append(truncated & ~terminated)
            after = torch.where(ended.unsqueeze(-1), self.seen(i + 1, -1), self.seen(i + 1))
            rows.append((self.seen(i), -self.seen(i)[:, :1], reward, terminated, truncated, after))
        obs, action, reward, terminated, truncated, after = (torch.stack(column) for column in zip(*rows, strict=True))
        return {"policy": obs}, action, reward, terminated, truncated, {"policy": after}

    def expected(self, i, b, n, discount):
        """The return of n steps from there, what counts of the value after it, and the observation it is of."""
        total, weight = 0.0, 1.0
        for k in range(n):
            total += weight * float(self.reward[i + k][b])
            if self.terminated[i + k][b]:
                return total, 0.0, None
            weight *= discount
            if self.truncated[i + k][b]:
                return total, weight, (-(i + k + 1), b)
        return total, weight, (i + n, b)


def empty(capacity=12, added=4):
    return replay_init({"policy": 2}, 1, ROBOTS, capacity, added, LENGTH)


@pytest.mark.parametrize("n", [1, 3])
def test_what_is_drawn_is_what_happened(n):
    history, replay = History(), empty()
    kinds = set()
    for round_ in range(20):
        replay = replay_add(replay, *history.steps(1 + round_ % 4))
        if history.count <= n:
            continue
        sample = replay_sample(replay, random.key(round_), 64, 0.9, n)
        for k in range(64):
            i, b = (int(x) for x in sample.obs_tm1["policy"][k])
            assert max(0, history.count - 12) <= i < history.count - n
            assert sample.a_tm1[k].tolist() == [-i]
            total, weight, after = history.expected(i, b, n, 0.9)
            assert float(sample.r_t[k]) == pytest.approx(total, abs=1e-6)
            assert float(sample.discount_t[k]) == pytest.approx(weight, abs=1e-6)
            kinds.add("terminated" if after is None else "truncated" if after[0] < 0 else "going")
            if after is not None:
                assert sample.obs_t["policy"][k].tolist() == list(after)
    assert kinds == {"terminated", "truncated", "going"}


def test_all_that_is_shown_is_drawn_alike():
    history, replay = History(), empty()
    for _ in range(10):
        replay = replay_add(replay, *history.steps(3))
    drawn = replay_sample(replay, random.key(0), 11 * ROBOTS * 200, 0.9).obs_tm1["policy"].to(torch.int64)
    counts = torch.zeros(30, ROBOTS).index_put((drawn[:, 0], drawn[:, 1]), torch.tensor(1.0), accumulate=True)
    # Of the last twelve steps all but the newest; 200 each, with a deviation of 14.
    assert not counts[:18].any() and not counts[29:].any()
    assert float((counts[18:29] - 200).abs().max()) < 5 * 14


def test_the_buffer_before_shows_what_it_showed():
    history, replay = History(), empty()
    for _ in range(7):
        replay = replay_add(replay, *history.steps(4))
    shown = replay_sample(replay, random.key(1), 500, 0.9, 2)
    after = replay_add(replay, *history.steps(4))
    again = replay_sample(replay, random.key(1), 500, 0.9, 2)
    for (name, x), (_, y) in zip(tree.named_leaves(shown), tree.named_leaves(again), strict=True):
        assert torch.equal(x, y), name
    # Newer steps are there, in the same memory.
    newest = replay_sample(after, random.key(1), 500, 0.9, 2).obs_tm1["policy"][:, 0]
    assert float(newest.max()) > float(shown.obs_tm1["policy"][:, 0].max())
    assert after.obs["policy"].data_ptr() == replay.obs["policy"].data_ptr()


def test_buffers_side_by_side_are_those_alone():
    histories = [History(seed) for seed in range(2)]
    alone = [empty() for _ in histories]
    together = tree.stack([empty() for _ in histories])
    for round_ in range(9):
        steps = [history.steps(1 + round_ % 4) for history in histories]
        alone = [replay_add(replay, *step) for replay, step in zip(alone, steps, strict=True)]
        together = torch.func.vmap(replay_add)(together, *tree.stack([list(step) for step in steps]))
    keys = random.split(random.key(0))
    drawn = torch.func.vmap(lambda replay, key: replay_sample(replay, key, 50, 0.9, 2))(together, keys)
    for i, replay in enumerate(alone):
        own = replay_sample(replay, keys[i], 50, 0.9, 2)
        for (name, x), (_, y) in zip(tree.named_leaves(own), tree.named_leaves(tree.index(drawn, i)), strict=True):
            assert torch.equal(x, y), name


def test_its_bytes_are_known_before_they_are_taken():
    arguments = ({"policy": 7, "critic": 11}, 3, 5, 100, 4, 50)
    replay = replay_init(*arguments)
    with torch.device("meta"):
        known = tree_bytes(replay_init(*arguments))
    assert known == sum(x.nbytes for x in tree.tree_leaves(replay))
    # 104 slots of 5 robots: 4 (7 + 11 + 3 + 1) + 1 + 8 bytes; and what is small besides.
    assert 0 < known - 104 * 5 * 97 < 0.1 * 104 * 5 * 97


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: replay_init({"policy": 2}, 1, 0, 12), "num_envs must be at least 1, got 0"),
        (lambda: replay_init({"policy": 2}, 1, 3, 0), "capacity must be at least 1, got 0"),
        (lambda: replay_init({"policy": 2}, 1, 3, 12, 6, 5), "at most the 5 steps of an episode .* got 6"),
        (lambda: replay_add(empty(), *History().steps(5)), "at most 4 steps can be added at once, got 5"),
        (
            lambda: replay_sample(empty(), random.key(0), 4, 0.9, 12),
            "n must be .* below the capacity of 12 steps, got 12",
        ),
    ],
)
def test_what_cannot_work_is_refused(call, match):
    with pytest.raises(InputError, match=match):
        call()
