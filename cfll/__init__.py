"""cfll: networks whose last linear layer is solved in closed form at every step.

Layers, bottom to top: `heads`, `samples`, `solve`, `stats`, `losses`, `rules`, `transform`; beside
the last, `cfll.iv` has two-stage heads and `networks` the backbones it trains. `cfll.flax` is
imported by those who use Flax.
"""

from cfll.heads import LinearHead, get_head, set_head
from cfll.losses import prox_loss, ridge_loss
from cfll.rules import (
    AdaptiveState,
    ClosedFormState,
    HeadInfo,
    Rule,
    Solution,
    adaptive_prox,
    averaged_ridge,
    every,
    huber,
    logistic,
    poisson,
    prox,
    ridge,
    softmax,
)
from cfll.solve import CG, Route, SolveInfo, penalized_solve, prox_solve, ridge_solve
from cfll.stats import GramStats
from cfll.transform import closed_form, closed_form_head, get_state

__version__ = "0.1.0"

__all__ = [
    "CG",
    "AdaptiveState",
    "ClosedFormState",
    "GramStats",
    "HeadInfo",
    "LinearHead",
    "Route",
    "Rule",
    "Solution",
    "SolveInfo",
    "adaptive_prox",
    "averaged_ridge",
    "closed_form",
    "closed_form_head",
    "every",
    "get_head",
    "get_state",
    "huber",
    "logistic",
    "penalized_solve",
    "poisson",
    "prox",
    "prox_loss",
    "prox_solve",
    "ridge",
    "ridge_loss",
    "ridge_solve",
    "set_head",
    "softmax",
]
