"""Rules: how the next head follows. One rule, one file; `rule` has what they share."""

from cfll.rules.adaptive import AdaptiveState, adaptive_prox
from cfll.rules.every import every
from cfll.rules.kalman import KalmanState, kalman
from cfll.rules.prox import prox
from cfll.rules.ridge import averaged_ridge, ridge
from cfll.rules.rule import ClosedFormState, HeadInfo, PenaltyState, Rule, Solution
from cfll.rules.working import huber, logistic, poisson, softmax

__all__ = [
    "AdaptiveState",
    "ClosedFormState",
    "HeadInfo",
    "KalmanState",
    "PenaltyState",
    "Rule",
    "Solution",
    "adaptive_prox",
    "averaged_ridge",
    "every",
    "huber",
    "kalman",
    "logistic",
    "poisson",
    "prox",
    "ridge",
    "softmax",
]
