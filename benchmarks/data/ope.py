r"""Offline policy evaluation: transitions of one policy, the value of another.

Two small environments with noise in the action (Chen et al., JMLR 23:302, take the same two from
bsuite): with probability `NOISE` the environment takes a uniform action instead of the one chosen,
and nobody is told. Cartpole is that of Barto, Sutton and Anderson (1983), with the constants and
Euler steps of OpenAI Gym: reward 1 per step until the pole is 12 degrees or the cart 2.4 m off.
Mountain Car is that of Moore (1990), constants of Gym: reward -1 per step until the car is up.

The target policy is a soft controller, the behaviour policy the same one that is uniform in half
of its choices. Value: :math:`E[\sum_t \gamma^t r_t]` from the start. Data are episodes of the
behaviour policy, stopped after `LIMIT` steps, which is not a terminal state.

Bottom of the benchmarks: NumPy only, knows neither models nor cfll.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

NOISE, UNIFORM, LIMIT = 0.2, 0.5, 1000
SHORTEST = 10  # steps that an episode lasts on average at least


class Environment(NamedTuple):
    """Dynamics without noise, on many states at once, and the target policy.

    Attributes:
      discount: gamma.
      num_actions: a is 0 .. num_actions - 1.
      start: (generator, n) -> states (n, d).
      step: states, actions (n,) -> next states, rewards (n,), whether it ends there (n,).
      policy: states -> probabilities of the target policy, (n, num_actions).
      center, scale: of states, (d,); networks see (state - center) / scale.
    """

    discount: float
    num_actions: int
    start: Callable[[np.random.Generator, int], np.ndarray]
    step: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, ...]]
    policy: Callable[[np.ndarray], np.ndarray]
    center: tuple[float, ...]
    scale: tuple[float, ...]


class Transitions(NamedTuple):
    """Rows of (s, a, r, s', a'), float32. A pair is a scaled state beside a one-hot action.

    Attributes:
      now: (s, a), (n, d + num_actions).
      reward: r, (n, 1).
      later: (s', a'), a' drawn from the target policy at s'.
      continues: 0 where the episode ended with this transition, else 1, (n, 1).
    """

    now: np.ndarray
    reward: np.ndarray
    later: np.ndarray
    continues: np.ndarray


class Starts(NamedTuple):
    """Where an episode of the target policy begins: every action at some first states, float32.

    Attributes:
      pairs: (s, a), (n, d + num_actions).
      weights: of their values in the policy's, (n, 1), of sum one.
    """

    pairs: np.ndarray
    weights: np.ndarray


def cartpole_step(states: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, ...]:
    """Cart position and speed, angle of the pole and its speed; push left (0) or right (1)."""
    gravity, cart, pole, half_length, push, seconds = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
    _, x_speed, angle, angle_speed = states.T
    force = push * (2 * actions - 1)
    sine, cosine, total = np.sin(angle), np.cos(angle), cart + pole
    pushed = (force + pole * half_length * angle_speed**2 * sine) / total
    turn = (gravity * sine - cosine * pushed) / (half_length * (4 / 3 - pole * cosine**2 / total))
    speed_up = pushed - pole * half_length * turn * cosine / total
    rates = np.stack([x_speed, speed_up, angle_speed, turn], axis=1)
    after = states + seconds * rates
    ended = (np.abs(after[:, 0]) > 2.4) | (np.abs(after[:, 2]) > 12 * np.pi / 180)
    return after, np.ones(len(after)), ended


def mountain_car_step(states: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, ...]:
    """Position and speed; push back (0), not at all (1), forward (2)."""
    position, speed = states.T
    speed = np.clip(speed + 0.001 * (actions - 1) - 0.0025 * np.cos(3 * position), -0.07, 0.07)
    position = np.clip(position + speed, -1.2, 0.6)
    speed = np.where((position == -1.2) & (speed < 0), 0, speed)
    return np.stack([position, speed], axis=1), -np.ones(len(states)), position >= 0.5


def cartpole_policy(states: np.ndarray) -> np.ndarray:
    """Push to where the pole falls, the surer the farther it is."""
    right = 1 / (1 + np.exp(-(10 * states[:, 2] + states[:, 3])))
    return np.stack([1 - right, right], axis=1)


def mountain_car_policy(states: np.ndarray) -> np.ndarray:
    """Push to where the car moves."""
    along = np.array([-1, 0, 1]) * states[:, 1:]
    weights = np.exp(500 * along)
    return weights / weights.sum(axis=1, keepdims=True)


ENVIRONMENTS = {
    "cartpole": Environment(
        0.95,
        2,
        lambda rng, n: rng.uniform(-0.05, 0.05, (n, 4)),
        cartpole_step,
        cartpole_policy,
        (0.0, 0.0, 0.0, 0.0),
        (1.0, 1.0, 0.1, 1.0),
    ),
    "mountain_car": Environment(
        0.99,
        3,
        lambda rng, n: np.stack([rng.uniform(-0.6, -0.4, n), np.zeros(n)], axis=1),
        mountain_car_step,
        mountain_car_policy,
        (-0.5, 0.0),
        (0.4, 0.03),
    ),
}
ENVIRONMENTS["cartpole_long"] = ENVIRONMENTS["cartpole"]._replace(discount=0.99)


def choose(rng: np.random.Generator, probabilities: np.ndarray) -> np.ndarray:
    """One action per row, (n,)."""
    draws = rng.random((len(probabilities), 1))
    return np.sum(np.cumsum(probabilities, axis=1)[:, :-1] < draws, axis=1)


def play(
    environment: Environment, rng: np.random.Generator, episodes: int, uniform: float
) -> list[tuple[np.ndarray, ...]]:
    """Episodes side by side; per step (which, s, a, r, s', ended), of those that go on.

    Args:
      environment: what is played.
      rng: of everything drawn.
      episodes: how many.
      uniform: share of choices that are uniform instead of the target policy's.
    """
    states, which = environment.start(rng, episodes), np.arange(episodes)
    steps: list[tuple[np.ndarray, ...]] = []
    for _ in range(LIMIT):
        even = 1 / environment.num_actions
        actions = choose(rng, uniform * even + (1 - uniform) * environment.policy(states))
        other = rng.integers(0, environment.num_actions, len(states))
        taken = np.where(rng.random(len(states)) < NOISE, other, actions)
        after, rewards, ended = environment.step(states, taken)
        steps.append((which, states, actions, rewards, after, ended))
        states, which = after[~ended], which[~ended]
        if not len(which):
            break
    return steps


def returns(name: str, episodes: int, uniform: float = 0.0, seed: int = 0) -> np.ndarray:
    """Discounted returns of episodes, (episodes,); their mean is the policy's value."""
    total = np.zeros(episodes)
    environment = ENVIRONMENTS[name]
    steps = play(environment, np.random.default_rng(seed), episodes, uniform)
    for t, (which, _, _, rewards, _, _) in enumerate(steps):
        total[which] += environment.discount**t * rewards
    return total


def make_transitions(name: str, num: int, seed: int) -> Transitions:
    """Whole episodes of the behaviour policy, as many as give the first `num` transitions.

    Args:
      name: of the environment.
      num: n.
      seed: of everything drawn.
    """
    environment, rng = ENVIRONMENTS[name], np.random.default_rng(seed)
    steps = play(environment, rng, 1 + num // SHORTEST, UNIFORM)
    which, states, actions, rewards, after, ended = map(np.concatenate, zip(*steps, strict=True))
    order = np.argsort(which, kind="stable")[:num]
    states, actions, after = states[order], actions[order], after[order]
    return Transitions(
        now=pairs(environment, states, actions),
        reward=rewards[order, None].astype(np.float32),
        later=pairs(environment, after, choose(rng, environment.policy(after))),
        continues=1 - ended[order, None].astype(np.float32),
    )


def continuations(name: str, pairs_now: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What may follow pairs (s, a), which an experimenter does not know: (s', a'), probabilities.

    Args:
      name: of the environment.
      pairs_now: (n, d + num_actions).

    Returns:
      Pairs (k, n, d + num_actions), one for each action taken and each a', and probabilities
      (k, n, 1), which sum to that of going on.
    """
    environment = ENVIRONMENTS[name]
    scaled, chosen = np.split(np.asarray(pairs_now, float), [len(environment.center)], axis=1)
    states, even = scaled * environment.scale + environment.center, 1 / environment.num_actions
    later, probabilities = [], []
    for taken in range(environment.num_actions):
        after, _, ended = environment.step(states, np.full(len(states), taken))
        moved = (1 - NOISE) * chosen[:, taken] + NOISE * even
        for action, choice in enumerate(environment.policy(after).T):
            later.append(pairs(environment, after, np.full(len(after), action)))
            probabilities.append((moved * ~ended * choice)[:, None].astype(np.float32))
    return np.stack(later), np.stack(probabilities)


def make_starts(name: str, num: int, seed: int) -> Starts:
    """Every action at `num` first states."""
    environment, rng = ENVIRONMENTS[name], np.random.default_rng(seed)
    states = environment.start(rng, num)
    actions = np.tile(np.arange(environment.num_actions), num)
    weights = environment.policy(states).reshape(-1, 1) / num
    repeated = np.repeat(states, environment.num_actions, axis=0)
    return Starts(pairs(environment, repeated, actions), weights.astype(np.float32))


def pairs(environment: Environment, states: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Scaled states beside one-hot actions."""
    scaled = (states - environment.center) / environment.scale
    chosen = np.eye(environment.num_actions)[actions]
    return np.concatenate([scaled, chosen], axis=1).astype(np.float32)
