r"""Two-stage heads: deep-feature instrumental variables (DFIV), Appendix D of the paper.

An outcome :math:`y = f(x) + \epsilon` is confounded, :math:`E[\epsilon | x] \ne 0`, but there is an
instrument z with :math:`E[\epsilon | z] = 0`. Then :math:`E[y | z] = E[f(x) | z]`, which is solved
for f in two regressions, each with a closed-form last layer:

``stage 1``
    Predict the treatment's features from the instrument, :math:`W^\top \phi(z) \approx
    E[\psi(x) | z]`. Trains the network :math:`\phi` and solves W.
``stage 2``
    Predict the outcome from those predictions, :math:`w^\top W^{\star\top} \phi(z) \approx
    E[y | z]`. Trains the network :math:`\psi` *through* :math:`W^\star`, which is linear in the
    features :math:`\psi(x)` of the stage-1 data, and solves w.

The structural function is then :math:`f(x) = w^\top \psi(x)`. Observed covariates c enter stage 2:
its features are the products :math:`(\psi, 1) \otimes (\xi(c), 1)`.

`proximal` keeps both heads near their previous values, in the order of Eq. (17) or Algorithm 3;
`original` is the method of Xu et al. (2020). Both are a few pure functions over one state, in the
spirit of Optax: two `cfll.Rule` beside two backbones. Knows no Flax (`cfll.flax` wraps modules).
`cfll.iv.proxy` poses a problem with proxies of the confounder (DFPV) as one of these.
"""

from cfll.iv import proxy
from cfll.iv.evaluation import Refitted, predict, refit
from cfll.iv.methods import original, proximal
from cfll.iv.state import IVBatch, IVMethod, IVState, NetState, Networks
from cfll.networks import Backbone

__all__ = [
    "Backbone",
    "IVBatch",
    "IVMethod",
    "IVState",
    "NetState",
    "Networks",
    "Refitted",
    "original",
    "predict",
    "proximal",
    "proxy",
    "refit",
]
