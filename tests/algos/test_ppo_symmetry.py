"""PPO with left and right exchanged: losses by hand, symmetric gradients, and worlds seen from one side only."""

import dataclasses

import pytest
import torch

from algos.ppo import Batch, Networks, PPOConfig, augmented, make_ppo, ppo_loss, symmetry_loss
from rlcore import random, tree
from rlcore.env import auto_reset, make_env, time_limit
from rlcore.errors import InputError
from rlcore.networks import mlp
from rlcore.normalize import Moments, normalize
from rlcore.physics.engine import BatchEngine, ModelInfo
from rlcore.rewards import Term
from rlcore.symmetric_networks import symmetric_mlp
from rlcore.symmetry import SignedPermutation, Symmetry, apply


def mirror(permutation, sign):
    return SignedPermutation(torch.tensor(permutation), torch.tensor(sign))


# Observations: a left and a right number, one that changes its sign. Actions: of the left, of the right, sideways.
SEEN = mirror([1, 0, 2], [1.0, 1.0, -1.0])
DONE = mirror([1, 0, 2], [1.0, 1.0, -1.0])
# The value function sees a height and then the sideways number.
JUDGED = mirror([0, 1], [1.0, -1.0])
SYMMETRY = Symmetry({"policy": SEEN}, DONE)
CRITIC = Symmetry({"policy": SEEN, "critic": JUDGED}, DONE)

CONFIG = PPOConfig(
    num_envs=16,
    num_steps=4,
    num_epochs=2,
    num_minibatches=2,
    learning_rate=1e-2,
    discount=0.0,
    policy_layers=(),
    value_layers=(),
)


class Still(BatchEngine):
    """No physics: `qpos` is the three numbers that are seen and a height, and stays."""

    def __init__(self):
        super().__init__()
        self.model = ModelInfo(
            nq=4, nv=0, na=0, nu=3, nsensor=0, timestep=1.0, bodies=("world",), geoms=(), joints=(),
            actuators=("a", "b", "c"), actuator_joints=("", "", ""), ctrl_lower=(-2.0,) * 3, ctrl_upper=(2.0,) * 3,
            sensors={}, keyframes={},
        )  # fmt: skip

    def step(self, params, state, ctrl, wrench=None, *, substeps, key=None):
        return tree.replace(state, time=state.time + 1, fault=torch.zeros_like(state.fault))

    def forward(self, params, state, mask=None):
        return state


def both_sides(key):
    return random.uniform(key, (4,), -1.0, 1.0, dtype=torch.float64)


def one_side(key):
    """The left number is always above the right one, and the sideways one positive."""
    x = both_sides(key).abs()
    return torch.cat([x[:1] + 1.0, -x[1:2], x[2:3] + 0.2, x[3:]])


def best(x):
    """What is best done, a symmetric function of what is seen, `[..., 3]`."""
    left, right, side = x.unbind(-1)
    return torch.stack([0.4 * left + 0.3 * side, 0.4 * right - 0.3 * side, 0.5 * side + 0.2 * (left - right)], -1)


def best_upright(x):
    """The same where the third numbers keep their sign."""
    left, right, up = x.unbind(-1)
    return torch.stack([0.4 * left + 0.3 * up, 0.4 * right + 0.3 * up, 0.5 * up + 0.2 * (left + right)], -1)


def world(context=both_sides, critic=False, best=best):
    """One step, and a reward that is largest at `best`; the further the third number from zero, the more there is."""

    def reward(params, before, action, after):
        seen = before.physics.qpos[:3]
        return 2 * seen[2].abs() - (action - best(seen)).square().sum()

    def observe(params, state):
        qpos = state.physics.qpos
        groups = {"policy": {"seen": qpos[:3]}}
        return groups | ({"critic": {"height": qpos[3:], "side": qpos[2:3]}} if critic else {})

    env = make_env(
        Still(),
        name="still",
        control_dt=1.0,
        initial=lambda params, key: (context(key), torch.zeros(0)),
        observe=observe,
        terms=[Term("near", 1.0, reward)],
        terminate=lambda params, physics: physics.time < 0,
    )
    return auto_reset(time_limit(env, 1))


def config(**changes):
    return dataclasses.replace(CONFIG, **changes)


def image(x):
    return apply(SEEN, x)


def asymmetry(ppo, state, obs):
    """The difference between what is done and the mirror image of what is done in the mirror, in raw observations."""
    done = ppo.act(state, {"policy": obs}, None)
    return done - apply(DONE, ppo.act(state, {"policy": image(obs)}, None))


def mirrored_layer(layer, done=DONE, seen=SEEN):
    """A linear policy in the mirror: the action's map from the left, the observation's from the right."""
    return {"weight": apply(done, apply(seen, layer["weight"]).mT).mT, "bias": apply(done, layer["bias"])}


def symmetrized(params, done=DONE, seen=SEEN):
    """A linear policy's parameters, averaged with their mirror image."""
    (layer,) = params.policy
    halves = tree.map_leaves(lambda x, y: 0.5 * (x + y), layer, mirrored_layer(layer, done, seen))
    return tree.replace(params, policy=[halves])


# --- Losses ---


def test_symmetry_loss_by_hand():
    mean = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    # The image of the first row is (2, 1, -3), of the second (1, -1, 2).
    assert float(symmetry_loss(mean, torch.tensor([[2.0, 1.0, -3.0], [0.0, 0.0, 0.0]]), DONE)) == 0.0
    # (0, 0, 6) off by 36, and (1, -1, 2) by 6: 42 / 2.
    assert float(symmetry_loss(mean, torch.tensor([[2.0, 1.0, 3.0], [-1.0, 1.0, -2.0]]), DONE)) == pytest.approx(21.0)


def test_symmetry_loss_is_zero_for_a_network_that_is_symmetric():
    net = mlp((3, 8, 3), "tanh")
    params = net.init(random.key(0))
    obs = random.normal(random.key(1), (32, 3))

    def symmetric(x):
        return 0.5 * (net.apply(params, x) + apply(DONE, net.apply(params, image(x))))

    assert float(symmetry_loss(symmetric(obs), symmetric(image(obs)), DONE)) < 1e-12
    assert float(symmetry_loss(net.apply(params, obs), net.apply(params, image(obs)), DONE)) > 0.1


def batch_of(n, seed=0, dtype=torch.float32):
    """A minibatch of unscaled observations with its mirror images."""
    keys = random.split(random.key(seed), 8).unbind(0)
    draw = lambda i, *shape: random.normal(keys[i], (n, *shape), dtype)  # noqa: E731
    policy_obs, value_obs = draw(0, 3), draw(1, 2)
    mirrored = {"policy_obs": image(policy_obs), "value_obs": apply(JUDGED, value_obs)}
    return Batch(
        policy_obs=policy_obs,
        value_obs=value_obs,
        action=draw(2, 3),
        log_prob=-3.0 + 0.2 * draw(3),
        mean=draw(4, 3),
        advantage=draw(5),
        value=draw(6),
        target=draw(7),
        mirrored=mirrored,
    )


def reflected(data):
    """The mirror image of a whole minibatch."""
    return tree.replace(
        data,
        policy_obs=data.mirrored["policy_obs"],
        value_obs=data.mirrored["value_obs"],
        action=apply(DONE, data.action),
        mean=apply(DONE, data.mean),
        mirrored={"policy_obs": data.policy_obs, "value_obs": data.value_obs},
    )


def test_an_augmented_minibatch_holds_each_transition_and_its_image():
    data = batch_of(5)
    twice = augmented(data, DONE)
    own, other = (tree.index(twice, rows) for rows in (slice(0, 5), slice(5, 10)))
    for name, x in tree.named_leaves(own):
        assert torch.equal(x, getattr(data, name)), name
    assert torch.equal(other.action, torch.stack([data.action[:, 1], data.action[:, 0], -data.action[:, 2]], -1))
    assert torch.equal(other.policy_obs, image(data.policy_obs))
    assert torch.equal(other.value_obs, torch.stack([data.value_obs[:, 0], -data.value_obs[:, 1]], -1))
    # What the acting policy knew of the action is taken over.
    for name in ("log_prob", "advantage", "value", "target"):
        assert torch.equal(getattr(other, name), getattr(data, name)), name
    # The image's own augmentation is the same with its halves exchanged.
    again = augmented(reflected(data), DONE)
    for (name, x), (_, y) in zip(tree.named_leaves(again), tree.named_leaves(twice), strict=True):
        assert torch.equal(x, torch.cat([y[5:], y[:5]])), name


COEFFICIENTS = {"clip": torch.tensor(0.2), "entropy_coefficient": torch.tensor(0.01)}
BOUNDS = (torch.full((3,), -0.5).double(), torch.full((3,), 0.5).double())


def networks(policy_layers=(), dtype=torch.float32):
    policy, value = mlp((3, *policy_layers, 3), "tanh"), mlp((2, 5, 1), "tanh")
    keys = random.split(random.key(7)).unbind(0)
    params = Networks(policy.init(keys[0]), value.init(keys[1]), torch.tensor([-0.3, -0.3, 0.1]))
    return tree.map_leaves(lambda x: x.to(dtype), params), (policy.apply, value.apply)


def gradient(params, data, settings, nets):
    loss = lambda p: ppo_loss(p, data, params.log_std, COEFFICIENTS, settings, BOUNDS, nets, DONE)  # noqa: E731
    return torch.func.grad_and_value(loss, has_aux=True)(params)


def test_an_augmented_gradient_of_a_symmetric_policy_is_symmetric():
    params, nets = networks(dtype=torch.float64)
    params = symmetrized(params)
    data = batch_of(32, dtype=torch.float64)
    off = {}
    for augment in (True, False):
        settings = config(symmetry_augmentation=augment, bounds_coefficient=0.1, value_clip=0.2)
        slope, _ = gradient(params, data, settings, nets)
        (layer,) = slope.policy
        own = {**layer, "log_std": slope.log_std}
        # A deviation has no sign.
        opposite = {**mirrored_layer(layer), "log_std": slope.log_std[DONE.permutation]}
        off[augment] = {name: float((x - opposite[name]).abs().max()) for name, x in own.items()}
    assert max(off[True].values()) < 1e-12
    # One-sided samples pull to one side.
    assert min(off[False].values()) > 1e-3


def test_a_minibatch_and_its_image_teach_the_same():
    params, nets = networks((6,), torch.float64)
    data = batch_of(16, dtype=torch.float64)
    for settings in (config(symmetry_augmentation=True), config(symmetry_augmentation=True, symmetry_coefficient=0.5)):
        slope, (loss, _) = gradient(params, data, settings, nets)
        other, (same, _) = gradient(params, reflected(data), settings, nets)
        assert float(loss) == pytest.approx(float(same), rel=1e-12)
        for (name, x), (_, y) in zip(tree.named_leaves(slope), tree.named_leaves(other), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("augment", [True, False])
def test_slope_of_the_loss_with_symmetry_is_the_finite_difference(augment):
    settings = config(symmetry_augmentation=augment, symmetry_coefficient=0.7)
    params, nets = networks((6,), torch.float64)
    data = batch_of(16, dtype=torch.float64)
    slope, (_, metrics) = gradient(params, data, settings, nets)
    assert float(metrics["loss/symmetry"]) > 0.1

    def loss(p):
        return float(ppo_loss(p, data, params.log_std, COEFFICIENTS, settings, BOUNDS, nets, DONE)[0])

    for i in range(4):
        direction = tree.map_leaves(lambda x, i=i: random.normal(random.key(i), x.shape, x.dtype), params)
        up, down = (loss(tree.map_leaves(lambda p, d, s=s: p + s * d, params, direction)) for s in (1e-6, -1e-6))
        along = tree.map_leaves(lambda g, d: (g * d).sum(), slope, direction)
        expected = sum(float(x) for x in tree.tree_leaves(along))
        assert (up - down) / 2e-6 == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_the_symmetry_loss_is_one_more_summand_with_or_without_augmentation():
    params, nets = networks((6,), torch.float64)
    data = batch_of(16, dtype=torch.float64)
    found = []
    for augment in (True, False):
        plain = gradient(params, data, config(symmetry_augmentation=augment), nets)[1]
        total, metrics = gradient(params, data, config(symmetry_augmentation=augment, symmetry_coefficient=2.0), nets)[
            1
        ]
        assert float(total - plain[0]) == pytest.approx(2.0 * float(metrics["loss/symmetry"]), rel=1e-9)
        assert "loss/symmetry" not in plain[1]
        # The divergence is that of the transitions that were seen.
        found.append((float(metrics["loss/symmetry"]), float(metrics["policy/kl"])))
    assert found[0] == pytest.approx(found[1], rel=1e-12)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"symmetry_augmentation": True}, r"symmetric_networks must be left out.*--ppo.symmetric-networks"),
        ({"symmetry_coefficient": 0.1}, r"symmetric_networks must be left out"),
        ({"policy_layers": (8, 7)}, r"policy_layers must be even sizes.*\(8, 7\).*--ppo.policy-layers"),
    ],
)
def test_symmetric_networks_that_cannot_be_are_refused(extra, words):
    with pytest.raises(InputError, match=words):
        config(symmetric_networks=True, **extra)


# --- The update ---


def test_training_stays_symmetric():
    """No number changes its sign here: parameters that are zero by symmetry would drift with the rounding of their
    gradients, which Adam scales up to whole steps."""
    swap = mirror([1, 0, 2], [1.0, 1.0, 1.0])
    observed = random.uniform(random.key(9), (64, 3), -1.0, 1.0)
    error = {}
    for augment in (True, False):
        ppo = make_ppo(
            world(best=best_upright), config(symmetry_augmentation=augment), symmetry=Symmetry({"policy": swap}, swap)
        )
        state = ppo.init(random.key(0))
        state = tree.replace(state, params=symmetrized(state.params, swap, swap))
        for _ in range(5):
            state, metrics = ppo.update(state)
        done, other = (ppo.act(state, {"policy": x}, None) for x in (observed, apply(swap, observed)))
        deviations = state.params.log_std
        error[augment] = (
            float((done - apply(swap, other)).abs().max()),
            float((deviations - apply(swap, deviations)).abs().max()),
            float(metrics["policy/symmetry_error"]),
        )
        assert float(done.abs().max()) > 0.1
    assert max(error[True]) < 1e-4 < 1e-3 < min(error[False])


@pytest.mark.parametrize("how", ["symmetry_augmentation", "symmetric_networks"])
def test_what_is_seen_from_one_side_is_learned_for_both(how):
    """All starts are on one side; the policy must know, and the value function must judge, the other one."""
    changes = {"num_envs": 64, "initial_std": 0.3, "policy_layers": (16,), "value_layers": (8,), "num_epochs": 4}
    settings = config(**{how: True}, **changes)
    ppo = make_ppo(world(one_side, critic=True), settings, symmetry=CRITIC)
    state = ppo.init(random.key(0))
    for _ in range(40):
        state, _ = ppo.update(state)
    x = torch.stack([one_side(key) for key in random.split(random.key(5), 64)]).float()
    seen, unseen = x[:, :3], image(x[:, :3])
    for obs in (seen, unseen):
        error = (ppo.act(state, {"policy": obs}, None) - best(obs)).square().mean().sqrt()
        assert float(error) < 0.2 < 0.5 < float(best(obs).square().mean().sqrt())
    network = mlp((2, 8, 1)) if how == "symmetry_augmentation" else symmetric_mlp((2, 8, 1), JUDGED, None)

    def value(obs):
        return network.apply(state.params.value, normalize(state.observation_moments["critic"], obs))

    judged = torch.cat([x[:, 3:], x[:, 2:3]], -1)
    own, other = value(judged), value(apply(JUDGED, judged))
    torch.testing.assert_close(own, other, rtol=0, atol=0.5)
    # In units of the returns' deviation: what is worth more is not worth the mean.
    assert float(own.max() - own.min()) > 1.0


def test_symmetric_networks_stay_symmetric_to_rounding():
    """The world shows one side alone, and the first parameters are what chance made them."""
    settings = config(symmetric_networks=True, policy_layers=(16,), policy_average=0.9)
    ppo = make_ppo(world(one_side, critic=True), settings, symmetry=CRITIC)
    state = ppo.init(random.key(0))
    for _ in range(10):
        state, metrics = ppo.update(state)
    observed = random.uniform(random.key(9), (64, 3), -1.0, 1.0)
    assert float(asymmetry(ppo, state, observed).abs().max()) < 1e-5
    assert float(ppo.act(state, {"policy": observed}, None).abs().max()) > 0.05
    assert float(metrics["policy/symmetry_error"]) < 1e-5
    left, right, _ = state.params.log_std.tolist()
    assert left == right != 0.0


def test_the_loss_keeps_a_policy_symmetric_where_the_reward_does_not():
    """A reward that is largest at one asymmetric action: 0.5, -0.5 and 0.5, whose image is -0.5, 0.5 and -0.5."""
    observed = random.uniform(random.key(9), (64, 3), -1.0, 1.0)
    wanted = torch.tensor([0.5, -0.5, 0.5])
    error = []
    for coefficient in (0.0, 10.0):
        ppo = make_ppo(
            world(best=lambda x: 0 * x + wanted),
            config(symmetry_coefficient=coefficient, num_epochs=4),
            symmetry=SYMMETRY,
        )
        state = ppo.init(random.key(0))
        for _ in range(12):
            state, _ = ppo.update(state)
        error.append(float(asymmetry(ppo, state, observed).square().mean()))
    assert error[0] > 0.3 and error[1] < 0.02


def test_observations_are_mirrored_before_they_are_scaled():
    """Moments that differ from side to side: the mirror image of a scaled observation would be another one."""
    settings = config(num_steps=1, num_epochs=1, num_minibatches=1, symmetry_coefficient=1.0)
    ppo = make_ppo(world(), settings, symmetry=SYMMETRY)
    state = ppo.init(random.key(0))
    lopsided = Moments(
        count=torch.tensor(10.0).double(),
        mean=torch.tensor([0.3, -0.2, 0.5]).double(),
        m2=torch.tensor([1.0, 9.0, 4.0]).double(),
    )
    (layer,) = state.params.policy
    params = tree.replace(state.params, policy=[{**layer, "weight": 100 * layer["weight"]}])
    moments = {"policy": lopsided}
    state = tree.replace(state, params=params, averaged=params.policy, observation_moments=moments)
    difference = asymmetry(ppo, state, state.obs["policy"])
    after, metrics = ppo.update(state)
    assert float(metrics["loss/symmetry"]) == pytest.approx(float(difference.square().sum(-1).mean()), rel=1e-5)
    # Ten samples before, and sixteen of each side.
    assert float(after.observation_moments["policy"].count) == 10 + 2 * 16
    # The metric is the same of the policy that came out, seen through the moments that it was learned with.
    learned = tree.replace(state, params=after.params, averaged=after.params.policy)
    root = float(asymmetry(ppo, learned, state.obs["policy"]).square().mean().sqrt())
    assert float(metrics["policy/symmetry_error"]) == pytest.approx(root, rel=1e-5)


def test_the_first_step_of_a_symmetric_policy_seen_from_one_side():
    settings = config(num_epochs=1, num_minibatches=1, learning_rate=1e-12, symmetry_augmentation=True)
    ppo = make_ppo(world(one_side, critic=True), settings, symmetry=CRITIC)
    state = ppo.init(random.key(0))
    state, metrics = ppo.update(tree.replace(state, params=symmetrized(state.params)))
    # A symmetric policy does the mirrored action in the mirror with the probability of the original: ratios are one.
    assert float(metrics["policy/clip_fraction"]) == 0.0 and abs(float(metrics["loss/policy"])) < 1e-6
    # Moments are those of both sides, so that scaling and mirroring can be exchanged.
    seen, judged = (state.observation_moments[group] for group in ("policy", "critic"))
    assert float(seen.count) == 2 * CONFIG.batch_size
    for moments, sides in ((seen, SEEN), (judged, JUDGED)):
        torch.testing.assert_close(apply(sides, moments.mean), moments.mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(moments.m2[sides.permutation], moments.m2)
    assert abs(float(judged.mean[0])) > 0.3


def test_a_symmetry_that_is_not_used_changes_nothing():
    runs = []
    for symmetry in (None, CRITIC):
        ppo = make_ppo(world(critic=True), CONFIG, symmetry=symmetry)
        state = ppo.init(random.key(0))
        for _ in range(2):
            state, metrics = ppo.update(state)
        runs.append((state, metrics))
    (plain, metrics), (given, more) = runs
    for (name, x), (_, y) in zip(tree.named_leaves(plain), tree.named_leaves(given), strict=True):
        assert torch.equal(x, y), name
    assert more.keys() - metrics.keys() == {"policy/symmetry_error"}
    for name in metrics:
        assert torch.equal(metrics[name].nan_to_num(7.5), more[name].nan_to_num(7.5)), name


def test_a_population_is_what_each_would_be_alone():
    settings = config(symmetry_augmentation=True, symmetry_coefficient=0.5)
    ppo = make_ppo(world(critic=True), settings, symmetry=CRITIC)
    states = [ppo.init(random.key(seed)) for seed in (0, 1)]
    together, metrics = torch.func.vmap(ppo.update)(tree.stack(states))
    for i, state in enumerate(states):
        alone, own = ppo.update(state)
        for (name, x), (_, y) in zip(tree.named_leaves(alone.params), tree.named_leaves(together.params), strict=True):
            torch.testing.assert_close(x, y[i], rtol=1e-4, atol=2e-6, msg=name)
        for name in ("loss/symmetry", "policy/symmetry_error"):
            torch.testing.assert_close(own[name], metrics[name][i], rtol=1e-4, atol=1e-6)


# --- Mistakes ---


@pytest.mark.parametrize("changes", [{"symmetry_coefficient": 0.1}, {"symmetry_augmentation": True}])
def test_symmetry_without_maps_is_refused(changes):
    ((name, value),) = changes.items()
    flag = "--ppo." + name.replace("_", "-")
    message = rf"{name} must be left out where no symmetry is given, got {value} \({flag}\)"
    with pytest.raises(InputError, match=message):
        make_ppo(world(), config(**changes))
    params, nets = networks()
    with pytest.raises(InputError, match=message):
        ppo_loss(params, batch_of(4), params.log_std, COEFFICIENTS, config(**changes), BOUNDS, nets)


def test_maps_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="missing are critic, there are policy"):
        make_ppo(world(critic=True), CONFIG, symmetry=SYMMETRY)
    with pytest.raises(InputError, match="symmetry of 'policy' must be of size 3"):
        make_ppo(world(), CONFIG, symmetry=Symmetry({"policy": JUDGED}, DONE))
    with pytest.raises(InputError, match="symmetry of actions must be of size 3"):
        make_ppo(world(), CONFIG, symmetry=Symmetry({"policy": SEEN}, JUDGED))
