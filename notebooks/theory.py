# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The theory of the closed-form last layer, in pictures
#
# The paper proves four theorems (Sections 3 to 5, Appendix C) and reads the proximal step as a Kalman
# update (Appendix A). This notebook checks each of them with numbers, in float64, and says where a
# formula holds only for $\beta = 0$, or an argument does not go through although its conclusion does.
# It runs in under two minutes on two CPU cores.
#
# It needs a clone of the repository: the checks are in `benchmarks/experiments/theory/`, one pure function
# each.

# %%
# In Colab, or wherever cfll is not installed yet. (In a clone: python -m pip install -e ".[notebooks,benchmarks]")
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("cfll") is None:
    packages = ["cfll[benchmarks]", "diffrax"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *packages], check=True)

if importlib.util.find_spec("benchmarks") is None:  # a clone, but started in notebooks/
    sys.path.insert(0, "..")

# %%
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
from IPython.display import Image

from benchmarks.experiments import landscape, theory

folder = Path(mkdtemp())


def numbers(*checks):
    """Results of checks as the figures take them."""
    return [check._asdict() for check in checks]


# %% [markdown]
# ## Figure 1: walk on the curve, not on the surface
#
# $f(x) = W\,\mathrm{ReLU}(\theta x)$ has two parameters, so its loss is a landscape. For every $\theta$
# the best head $W^\star(\theta)$ is one `cfll.ridge_solve` (blue). Gradient descent on both parameters has to
# find the valley first (dashed); with the head in closed form it starts in it (solid). Same start, same
# rate, in both. Samples and start of the picture were picked for a legible one, so they prove nothing: the last
# line counts random problems.

# %%
settings = landscape.Settings()
result = landscape.run(settings)
landscape.draw(settings, result, folder / "landscape.png")
print("steps to the thin line, per rate:", *settings.rates)
for name, steps in result["steps"].items():
    print(f"  {name:14s}", *("not reached" if n is None else n for n in steps))
ahead, behind = (
    result["random"][f"{name} first"] for name in (landscape.CLOSED_FORM, landscape.JOINT)
)
print(
    f"of {settings.num_draws} random problems, closed form ahead : behind, per rate, then at the best rate of each:"
)
print("  ", *(f"{a} : {b}" for a, b in zip(ahead, behind, strict=True)), sep="  ")
Image(folder / "landscape.png", width=850)

# %% [markdown]
# ## Theorems 1 and 2: no backpropagation through the solve
#
# $\nabla_\theta \mathcal L^\star(\theta) = \nabla_\theta \mathcal L(W^\star, \theta)$, Eq. (7), and Eq. (16) for the
# proximal loss. Compared here: `jax.grad` of `cfll.ridge_loss` and `cfll.prox_loss`, which do not
# differentiate the solve, against `jax.grad` through an explicit solve. What is left is
# the rounding of the head, which the gradient at a fixed head takes over: more for smaller $\beta$, most where
# the dual route is forced on more samples than features. Here the routes are primal, dual and qr.

# %%
print(
    "depth, width, d, o, n     relative difference at beta, lam =",
    *theory.check_envelope(0).penalties,
)
for seed in range(3):
    found = theory.check_envelope(seed)
    for name in ("ridge", "prox"):
        print(f"{found.sizes!s:24}  {name:5}", *(f"{value:8.0e}" for value in getattr(found, name)))

# %% [markdown]
# ## Theorem 3: the loss is not convex in the features
#
# Left: $\phi$ and $-\phi$ have the same loss (the head changes its sign), and between them lies $\phi = 0$,
# where the loss is $\|Y\|^2$, the largest it can be. Middle: features orthogonal to all outputs are critical, and
# any step aside lowers the loss, by the square of its length.
#
# Right: for $\beta > 0$ the loss of $c\,\phi$ falls for every larger $c$, because a smaller head does the
# same work. So there is *no* minimizer among the features: $\inf \mathcal L^\star = 0$ is approached as they grow.
# The critical points are those with $Y_\star = 0$, and they are maxima: with $H$ the ridge hat matrix,
# $\Phi^\top \nabla\mathcal L^\star = -2\,H Y^\top Y (I - H)$, and $I - H$ is invertible. The minimizers and
# saddles that the paper has in mind exist for $\beta = 0$.

# %%
betas = (0.0, 1e-3, 0.1, 1.0)
convexity, critical = theory.check_convexity(0, betas), theory.check_critical(0, betas)
theory.draw_convexity(numbers(convexity), numbers(critical), folder / "convexity.png")
print(
    "features that attain one of two outputs, relative gradient per beta:",
    critical.partial.round(3),
)
Image(folder / "convexity.png", width=850)

# %% [markdown]
# ## Theorem 4: the kernel regime
#
# In the infinite-width limit features move by
# $$\dot\Phi = -\nabla \mathcal L^\star(\Phi)\, K = 2\, W^{\star\top} Y_\perp K, \qquad K = K(X, X) \in \mathbb R^{n \times n}.$$
# This is Eq. (37) with two changes. The tangent kernel couples *samples*: in general it is a matrix of $(n d) \times (n d)$, in the
# limit $K \otimes I$, and so it stands on the side of the samples, not as $d \times d$ in front. And the gradient is
# Eq. (28); Eq. (33), with $Y_\star$ in place of $Y$, equals it for $\beta = 0$ only.
#
# Does $Y_\perp$ vanish? Yes. For $\beta = 0$ exponentially, to a minimizer, with features that hardly grow:
# $\Phi K^{-1} \Phi^\top$ is conserved. For $\beta > 0$ as $t^{-1/2}$, while the features grow as $t^{1/4}$ without end,
# $\frac{d}{dt} \Phi K^{-1} \Phi^\top = 4 \beta\, W^{\star\top} W^\star$: the loss tends to its infimum, the features do
# not converge.

# %%
flows = [theory.check_flow(0, beta, 1e5 if beta > 0 else 30.0) for beta in betas]
theory.draw_flow(numbers(*flows), folder / "flow.png")
for flow in flows[1:]:
    print(f"beta = {flow.beta:g}: unattained targets fall as t^{flow.slope:.2f}")
Image(folder / "flow.png", width=850)

# %% [markdown]
# ## The proof of Theorem 4
#
# It rests on Eq. (40), $\frac{d}{dt} Y_\star Y_\star^\top = 2 (A B + B A)$, here with $A = Y_\perp K Y_\perp^\top$ and
# $B = W^\star W^{\star\top}$, and on its right side being positive semi-definite, so that no eigenvalue of $Y_\star Y_\star^\top$
# can fall. Two findings:
#
# * Eq. (39) uses $Y_\perp Y_\star^\top = 0$. That is so for $\beta = 0$; otherwise it is $Y H (I - H) Y^\top$. But with
#   $Y Y_\star^\top$ on the left side the equation is exact for *every* $\beta \ge 0$ (right, black).
# * $A B + B A$ of two positive semi-definite matrices need not be semi-definite, unless they commute, as
#   numbers do ($o = 1$). With two outputs eigenvalues do fall, for $\beta = 0$, too (left).
#
# The conclusion does not depend on that. For $\beta = 0$ critical points that are not minima are strict saddles: turning an unused
# direction of the features towards a missing principal output lowers the loss to second order. The flow
# avoids them from almost every start. That is our argument, not the paper's; every start tried here
# arrives.

# %%
identities = theory.check_identities(0, betas, num_draws=400)
eigenvalues = theory.check_eigenvalues(0, num_starts=20, horizon=30.0)
theory.draw_eigenvalues(numbers(eigenvalues), numbers(identities), folder / "eigenvalues.png")
print(f"random features, beta = 0: AB + BA indefinite in {identities.indefinite[0]:.0%},", end=" ")
print(
    f"an eigenvalue falls in {identities.falling[0]:.0%}; one output: {identities.falling_single[0]:.0%}"
)
print(f"flows, beta = 0: an eigenvalue falls in {np.mean(eigenvalues.falls > 1e-3):.0%},", end=" ")
print(
    f"at most by {eigenvalues.falls.max():.0%}; largest |Y_perp| / |Y| at the end: {eigenvalues.perp.max():.0e}"
)
Image(folder / "eigenvalues.png", width=850)

# %% [markdown]
# ## Do wide networks follow?
#
# Networks of one hidden layer (erf, the parametrization of Eq. (34)), trained on $\mathcal L^\star$ with full batches by
# `cfll.ridge_loss`, $\beta = 0.1$, against the kernel flow from the same initial features. Features are
# pre-activations: behind a nonlinearity the tangent kernel of finitely many features would change as they do.

# %%
wide = [
    theory.check_width(0, width, 8, num_steps=2000, step_size=1e-3) for width in (128, 512, 2048)
]
theory.draw_width(numbers(*wide), folder / "width.png")
for run in wide:
    print(
        f"width {run.width:5d}: dPhi/dt differs by {run.velocity.mean():4.0%} from K on the samples' side,",
        end=" ",
    )
    print(f"by {run.left.mean():.0%} from the best d x d matrix on the features' side")
Image(folder / "width.png", width=850)

# %% [markdown]
# ## Appendix A: a Kalman filter that forgets its covariance
#
# One proximal step, Eq. (13), is the measurement update of a Kalman filter on $\mathrm{vec}(W)$ with the prior
# $\mathcal N(W_t, \sigma_W^2 I)$ and $\lambda = \sigma_Y^2 / \sigma_W^2$. Against a textbook update in NumPy:

# %%
kalman = theory.check_kalman(0, num_problems=10)
print(
    f"largest relative difference: {kalman.difference.max():.0e}, lam from {kalman.lams.min():.0e} to {kalman.lams.max():.0e}"
)
print(
    f"against the filter that keeps its covariance, after five batches: {np.median(kalman.filtered):.0%} (median)"
)

# %% [markdown]
# `python -m benchmarks theory` repeats all of this with more draws and prints the sentences of the paper
# with the figures that decide them.
