"""cfll: networks whose last linear layer is solved in closed form at every step.

Layers, bottom to top: `heads`, `samples`, `solve`, `moments`, `stats`, `posterior`, `losses`,
`rules`, `keywords`, `transform`; beside the last, `networks` has backbones and `cfll.iv` the
two-stage heads that they train with.
`cfll.flax` and `cfll.iv` are imported when they are used first.
"""

import importlib
from types import ModuleType

from cfll.heads import LinearHead, get_head, set_head
from cfll.losses import prox_loss, ridge_loss
from cfll.posterior import EvidenceInfo, Posterior, bayesian_ridge
from cfll.rules import (
    AdaptiveState,
    ClosedFormState,
    HeadInfo,
    KalmanState,
    Rule,
    Solution,
    adaptive_prox,
    averaged_ridge,
    every,
    huber,
    kalman,
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
    "EvidenceInfo",
    "GramStats",
    "HeadInfo",
    "KalmanState",
    "LinearHead",
    "Posterior",
    "Route",
    "Rule",
    "Solution",
    "SolveInfo",
    "adaptive_prox",
    "averaged_ridge",
    "bayesian_ridge",
    "closed_form",
    "closed_form_head",
    "every",
    "get_head",
    "get_state",
    "huber",
    "kalman",
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


def __getattr__(name: str) -> ModuleType:
    """`cfll.flax` and `cfll.iv`, without an import statement of their own."""
    if name in ("flax", "iv"):
        return importlib.import_module(f"cfll.{name}")
    raise AttributeError(f"module 'cfll' has no attribute {name!r}")
