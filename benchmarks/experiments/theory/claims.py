"""The paper's sentences, the checks that each needs, and how it is decided."""

import itertools
from collections.abc import Callable

import numpy as np

from benchmarks.reporting.summary import Claim, Table, tabulate

Runs = list[dict[str, np.ndarray]]  # of a check, read back


def identities_table(found: dict[str, np.ndarray]) -> Table:
    """One row per beta."""

    def column(name: str, digits: str = ".0e") -> Callable[[int], str]:
        return lambda index: f"{found[name][index]:{digits}}"

    return tabulate(
        "Random features and targets: largest relative differences (Y⊥Y*ᵀ: norm over that of "
        "YYᵀ), and shares of the draws in which an eigenvalue of Y*Y*ᵀ falls along the flow, "
        "and in which the right side of Eq. (40) has a negative eigenvalue.",
        range(len(found["betas"])),
        {
            "β": column("betas", "g"),
            "Eq. (28)": column("gradient"),
            "Eq. (33)": column("gradient_star"),
            "Y⊥Y*ᵀ (zero in (39))": column("orthogonality"),
            "(40), left side Y*Y*ᵀ": column("forty_star"),
            "(40), left side YY*ᵀ": column("forty"),
            "λ falls": column("falling", ".0%"),
            "AB + BA indefinite": column("indefinite", ".0%"),
        },
    )


Decision = tuple[bool, str]  # whether it holds, and the figures
# Sentences in their order: the checks that each needs, and how to decide it.
SENTENCES: dict[str, tuple[tuple[str, ...], Callable[..., Decision]]] = {}


def sentence(text: str, *needs: str) -> Callable[[Callable[..., Decision]], Callable]:
    """The function decides this sentence, from the runs of these checks."""

    def keep(decide: Callable[..., Decision]) -> Callable[..., Decision]:
        SENTENCES[text] = needs, decide
        return decide

    return keep


def claims_of(results: dict[str, Runs]) -> list[Claim]:
    """Every sentence, decided by the checks that there are."""
    claims = []
    for text, (needs, decide) in SENTENCES.items():
        if all(name in results for name in needs):
            holds, evidence = decide(*(results[name] for name in needs))
            claims.append(Claim(text, bool(holds), evidence))
        else:
            claims.append(Claim(text, None, "not run"))
    return claims


def worst_of(runs: Runs, name: str) -> float:
    """The largest value of a field."""
    return float(max(np.max(run[name]) for run in runs))


def well_posed(runs: Runs, name: str) -> float:
    """The largest value of a field of `Envelope` where the penalty is at least one."""
    return float(max(np.max(run[name][run["penalties"] >= 1]) for run in runs))


@sentence("Theorem 1: the gradient of L* is that of the loss at the fixed head W*.", "envelope")
def _ridge(runs: Runs) -> Decision:
    # What is left is the rounding of the library's head.
    # The gradient at a fixed head takes over the head's error. It is largest on the dual route with
    # more samples than features, which "auto" does not take; the explicit solve agrees with the qr
    # route to 1e-12 there.
    worst, typical = worst_of(runs, "ridge"), well_posed(runs, "ridge")
    return typical < 1e-10 and worst < 1e-6, (
        f"largest relative difference {typical:.0e} to automatic differentiation through the "
        f"solve for β of 1 and 100, {len(runs)} networks, all routes of the solver in turn; "
        f"{worst:.0e} down to β = 1e-4: rounding of the head, largest on the dual route with n > d"
    )


@sentence("Theorem 2: the same for the proximal loss, without its penalty.", "envelope")
def _prox(runs: Runs) -> Decision:
    names = ("prox", "fixed")
    worst = max(worst_of(runs, name) for name in names)
    typical = max(well_posed(runs, name) for name in names)
    return typical < 1e-10 and worst < 1e-6, (
        f"the same for `prox_loss` and for ordinary backpropagation of the batch's loss at the "
        f"fixed head: {typical:.0e} for λ of 1 and 100, {worst:.0e} down to 1e-4"
    )


@sentence("Theorem 3: L* is not convex in the features.", "convexity")
def _convexity(runs: Runs) -> Decision:
    (run,) = runs
    excess = ", ".join(
        f"{e:.0%} (β = {b:g})" for e, b in zip(run["excess"], run["betas"], strict=True)
    )
    return bool(np.all(run["excess"] > 0)), (
        f"between φ and -φ, whose losses are equal, the loss of the midpoint is higher by {excess}"
    )


@sentence("Theorem 3: there are critical points that are not minima, φ = 0 among them.", "critical")
def _critical(runs: Runs) -> Decision:
    (run,) = runs
    gradient = max(run["orthogonal"].max(), run["zero"].max())
    return gradient < 1e-10 and bool(np.all(run["decrease"] > 0)), (
        "at φ = 0 and at features orthogonal to all outputs the gradient is at most "
        f"{gradient:.0e} of an ordinary one, and the loss is ||Y||², its largest value; a step ε "
        f"aside lowers it by c ε^{run['slope'].mean():.2f}"
    )


@sentence(
    "Section 5: some critical points are minimizers that balance the fit and β.",
    "critical",
    "convexity",
)
def _minimizer(critical: Runs, convexity: Runs) -> Decision:
    (run,), (lines,) = critical, convexity
    falls = bool(np.all(np.diff(lines["scaled"], axis=1) < 0))
    return not falls, (
        "for β > 0 the loss of c φ falls for all c up to 100 (the head shrinks as the features "
        "grow): its infimum is not attained, and Φᵀ∇L* = -2 Y*ᵀY⊥ vanishes only where Y* = 0. "
        "Features that attain one of two outputs exactly are critical at β = 0 (relative gradient "
        f"{run['partial'][0]:.0e}) and not at β = {run['betas'][1]:g} ({run['partial'][1]:.2f})"
    )


@sentence("Eq. (33): ∇L* = -2 (ΦΦᵀ + βI)⁻¹ΦY*ᵀY⊥.", "identities")
def _gradient(runs: Runs) -> Decision:
    (run,) = runs
    by_beta = ", ".join(
        f"{g:.0e} (β = {b:g})" for g, b in zip(run["gradient_star"], run["betas"], strict=True)
    )
    return run["gradient_star"].max() < 1e-8, (
        f"largest relative difference to automatic differentiation {by_beta}; Eq. (28), with Y for "
        f"Y*, {run['gradient'].max():.0e} at all β. VᵀY* = Σ²(Σ² + β)⁻¹VᵀY in Eq. (32)"
    )


@sentence("Eq. (37): the tangent kernel acts as a d x d matrix on the features.", "width")
def _orientation(runs: Runs) -> Decision:
    widest = runs[-1]
    left, right = widest["left"].mean(), widest["velocity"].mean()
    return left < right, (
        f"dΦ/dt of networks of width {int(widest['width'])} is {right:.0%} from K acting on the "
        f"samples (n x n), and {left:.0%} from the best matrix of features there is (means)"
    )


@sentence("Theorem 4: under kernel gradient flow, Y⊥ tends to zero.", "flow", "eigenvalues")
def _flow(flows: Runs, starts: Runs) -> Decision:
    zero, *positive = flows
    tails = ", ".join(
        f"t^{run['slope']:.2f} to {run['perp'][-1]:.0e} while the features grow "
        f"{run['size'][-1]:.1f} times (β = {run['beta']:g})"
        for run in positive
    )
    count, reached = len(starts[0]["perp"]), starts[0]["perp"].max()
    falling = all(run["perp"][-1] < 0.05 * run["perp"][0] for run in positive)
    return falling and reached < 1e-2, (
        f"||Y⊥|| / ||Y||: exponentially for β = 0 ({zero['perp'][-1]:.0e} at t = "
        f"{zero['time'][-1]:g}; {count} random starts, all below {reached:.0e}); as a power for "
        f"β > 0, {tails}, so L* tends to its infimum 0 but the features do not converge"
    )


@sentence("Eq. (40): d(Y*Y*ᵀ)/dt = 2(AB + BA) along the flow.", "identities", "flow")
def _forty(runs: Runs, flows: Runs) -> Decision:
    (run,) = runs
    off = ", ".join(
        f"{d:.0e} (β = {b:g})" for d, b in zip(run["forty_star"], run["betas"], strict=True)
    )
    return run["forty_star"].max() < 1e-8, (
        f"largest relative difference {off}; exact at β = 0 only, because Y⊥Y*ᵀ = YH(I - H)Yᵀ is "
        f"not zero (up to {run['orthogonality'].max():.0%} of YYᵀ) and outweighs A late in a flow "
        f"(difference {max(f['forty_star'] for f in flows[1:]):.0%})"
    )


@sentence("Ours: for every β it holds with YY*ᵀ in place of Y*Y*ᵀ.", "identities", "flow")
def _forty_repaired(runs: Runs, flows: Runs) -> Decision:
    (run,) = runs
    worst = max(run["forty"].max(), *(flow["forty"] for flow in flows))
    return worst < 1e-8 and run["conserved"].max() < 1e-8, (
        f"largest relative difference {worst:.0e} (with A = Y⊥KY⊥ᵀ and B = W*W*ᵀ, all β, at random "
        "features and along the flows); the features' size obeys d(ΦK⁻¹Φᵀ)/dt = 4β W*ᵀW* "
        f"({run['conserved'].max():.0e}): conserved for β = 0, without bound for β > 0"
    )


@sentence(
    "Appendix C.1: the positive eigenvalues of Y*Y*ᵀ never fall.", "identities", "eigenvalues"
)
def _monotone(runs: Runs, starts: Runs) -> Decision:
    (run,), (many,) = runs, starts
    share = np.mean(many["falls"] > 1e-3)
    count = len(many["falls"])
    return bool(np.all(run["falling"] == 0) and share == 0), (
        "A ⪰ 0 and B ≻ 0 do not make AB + BA ⪰ 0: at random features it has a negative eigenvalue "
        f"in {run['indefinite'][0]:.0%} of the draws (β = 0, o = 2) and an eigenvalue of Y*Y*ᵀ "
        f"falls in {run['falling'][0]:.0%}; along {count} flows one falls by more than 0.1% in "
        f"{share:.0%}, at most by {many['falls'].max():.0%}. All of these flows reach Y⊥ = 0 anyway"
    )


@sentence("They do not with one output.", "identities")
def _monotone_single(runs: Runs) -> Decision:
    (run,) = runs
    return bool(np.all(run["falling_single"] == 0)), (
        f"Y*Y*ᵀ, a number, falls in {run['falling_single'].max():.0%} of the draws, for every β"
    )


@sentence("Ours: the flow leaves critical points that are not minima.", "critical")
def _saddle(runs: Runs) -> Decision:
    (run,) = runs
    return bool(run["reached"] < 1e-3), (
        f"from 1e-3 beside a critical point with {run['partial_loss'][0]:.0%} of ||Y||² left, the "
        f"flow reaches ||Y⊥|| / ||Y|| = {run['reached']:.0e} (β = 0)"
    )


@sentence(
    "Section 5: wide networks trained on L* follow the kernel flow, the wider the closer.", "width"
)
def _width(runs: Runs) -> Decision:
    means = [float(run["deviation"].mean()) for run in runs]
    widths = [int(run["width"]) for run in runs]
    falling = all(b < a for a, b in itertools.pairwise(means))
    rate = ""
    if len(runs) > 1:
        slope = np.polyfit(np.log(widths), np.log(means), 1)[0]
        rate = f" (about width^{slope:.2f})"
    listed = ", ".join(f"{m:.1%} at {w}" for m, w in zip(means, widths, strict=True))
    return falling and means[-1] < 0.1, (
        "largest relative deviation of the features on the path, mean of "
        f"{len(runs[0]['deviation'])} networks: {listed}{rate}"
    )


@sentence(
    "Appendix A: the proximal step is a Kalman update with the covariance collapsed, λ = "
    "variance of the targets over variance of a step of W.",
    "kalman",
)
def _kalman(runs: Runs) -> Decision:
    (run,) = runs
    return run["difference"].max() < 1e-9, (
        f"largest relative difference {run['difference'].max():.0e} over {len(run['lams'])} "
        f"problems, λ from {run['lams'].min():.0e} to {run['lams'].max():.0e}; the collapse of the "
        f"covariance moves the head by {np.median(run['filtered']):.0%} (median) after five batches"
    )
