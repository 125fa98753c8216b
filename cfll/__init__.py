"""cfll: networks whose last linear layer is solved in closed form at every step.

Layers, bottom to top: `heads`, `cg`, `cholesky`, `solve`, `stats`, `objectives`, `rules`,
`transform`; beside the last, `cfll.iv` has two-stage heads. `cfll.flax` is imported by those who
use Flax.
"""

from cfll.cg import CG
from cfll.heads import LinearHead, get_head, set_head
from cfll.objectives import prox_loss, ridge_loss
from cfll.rules import Rule, ema, prox, ridge
from cfll.solve import SolveInfo, prox_solve, ridge_solve
from cfll.stats import GramStats
from cfll.transform import ClosedFormState, HeadInfo, closed_form, closed_form_head

__version__ = "0.1.0"

__all__ = [
    "CG",
    "ClosedFormState",
    "GramStats",
    "HeadInfo",
    "LinearHead",
    "Rule",
    "SolveInfo",
    "closed_form",
    "closed_form_head",
    "ema",
    "get_head",
    "prox",
    "prox_loss",
    "prox_solve",
    "ridge",
    "ridge_loss",
    "ridge_solve",
    "set_head",
]
