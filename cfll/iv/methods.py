"""proximal, original: two networks, two rules, and the alternation of their updates."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cfll import rules
from cfll.heads import LinearHead, widest_dtype
from cfll.iv.state import (
    IVBatch,
    IVMethod,
    IVState,
    NetState,
    Networks,
    check_covariate,
    check_rows,
    features_shape,
    given,
    instrument_features,
    outcome_of,
    products,
    treatment_features,
)
from cfll.losses import penalized_loss
from cfll.rules import ClosedFormState, Rule
from cfll.rules.rule import Penalty, advance, initial_state
from cfll.solve import CG, prox_solve, ridge_solve
from cfll.solve.problem import check_value

SOLVE_THEN_DESCEND, DESCEND_THEN_SOLVE = "solve-then-descend", "descend-then-solve"


def proximal(
    networks: Networks,
    *,
    treatment_optimizer: optax.GradientTransformation,
    instrument_optimizer: optax.GradientTransformation,
    lam1: Penalty | Rule,
    lam2: Penalty | Rule,
    lam12: jax.typing.ArrayLike = 1e-4,
    order: str = SOLVE_THEN_DESCEND,
    stage1_steps: int = 20,
    stage2_steps: int = 1,
    use_bias: bool = True,
    penalize_bias: bool = True,
    solver: str | CG = "auto",
) -> IVMethod:
    r"""DFIV with proximal heads: works with mini-batches.

    Both heads are kept near their previous values. Stage 1 moves the instrument network, stage 2
    the treatment network; each solves its head on the batch, by default first, Eq. (17):

    .. math::
        W &\leftarrow \arg\min_W \textstyle\sum_i \|\psi_i - W^\top \phi_i\|^2
            + \lambda_1 \|W - W_t\|_F^2, &
        \theta_Z &\leftarrow \theta_Z - \alpha \nabla \mathcal L^{(1)}(W, \theta_Z) \\
        w &\leftarrow \arg\min_w \textstyle\sum_i \|y_i - w^\top W^{\star\top} \phi_i\|^2
            + \lambda_2 \|w - w_t\|^2, &
        \theta_X &\leftarrow \theta_X - \alpha \nabla \mathcal L^{(2)}(w, \theta_X)

    or, as Algorithm 3 is printed, last, on the features of the network that has moved: a second
    forward pass, and less accurate wherever it was measured. Inside stage 2
    :math:`W^\star(\theta_X)` is solved with :math:`\lambda_{1,2}`. It is linear in the treatment
    features, so its derivative is one more solve with the factor at hand; no factorization is ever
    differentiated.

    Args:
      networks: the backbones.
      treatment_optimizer: trains treatment and covariate network. It is told the loss, as
        ``optax.contrib.reduce_on_plateau`` and ``optax.lbfgs`` ask.
      instrument_optimizer: trains the instrument network; the same.
      lam1: proximal coefficient of W, multiplying a *sum* over samples; scalar, (d,), (d, d) or a
        schedule. Or a `cfll.Rule` of your own.
      lam2: the same of w.
      lam12: proximal coefficient of :math:`W^\star(\theta_X)`; the paper found that it has to be
        small.
      order: "solve-then-descend", or "descend-then-solve": Algorithm 3.
      stage1_steps, stage2_steps: T_1 and T_2, updates of each stage in a round.
      use_bias: whether both heads have an intercept.
      penalize_bias, solver: as in `cfll.prox_solve`.

    Returns:
      The method.

    Raises:
      ValueError, TypeError: while tracing, for shapes and dtypes that do not fit.

    Examples:
      >>> import optax
      >>> from cfll.iv import Backbone
      >>> net = Backbone(lambda w, stats, x, *, train: (jnp.tanh(x @ w), stats), jnp.ones((1, 8)))
      >>> z, confounder = jax.random.normal(jax.random.key(0), (2, 64, 1))
      >>> batch = IVBatch(instrument=z, treatment=z + confounder, outcome=z + 2 * confounder)
      >>> method = proximal(
      ...     Networks(treatment=net, instrument=net), treatment_optimizer=optax.sgd(0.01),
      ...     instrument_optimizer=optax.sgd(0.01), lam1=1.0, lam2=1.0)
      >>> state, losses = jax.jit(method.round)(method.init(batch), batch, batch)
      >>> int(state.stage1.count), int(state.stage2.count)
      (20, 1)

    References:
      Closed-Form Last Layer Optimization, Eq. (17) and Algorithm 3.
    """
    if order not in (SOLVE_THEN_DESCEND, DESCEND_THEN_SOLVE):
        raise ValueError(
            f"unknown order {order!r}; write {SOLVE_THEN_DESCEND!r} or {DESCEND_THEN_SOLVE!r}."
        )
    _check_penalties(lam1=lam1, lam2=lam2, lam12=lam12)
    options: Any = {"penalize_bias": penalize_bias, "solver": solver}

    def inner(features, targets, anchor):
        return prox_solve(features, targets, anchor, lam12, **options)

    def as_rule(lam: Penalty | Rule) -> Rule:
        return lam if isinstance(lam, Rule) else rules.prox(lam, **options)

    return _method(
        networks,
        (instrument_optimizer, treatment_optimizer),
        (as_rule(lam1), as_rule(lam2)),
        inner=inner,
        order=order,
        steps=(stage1_steps, stage2_steps),
        use_bias=use_bias,
    )


def original(
    networks: Networks,
    *,
    treatment_optimizer: optax.GradientTransformation,
    instrument_optimizer: optax.GradientTransformation,
    beta1: jax.typing.ArrayLike,
    beta2: jax.typing.ArrayLike,
    stage1_steps: int = 20,
    stage2_steps: int = 1,
    use_bias: bool = True,
    penalize_bias: bool = True,
    solver: str | CG = "auto",
) -> IVMethod:
    r"""DFIV as published (Xu et al., 2020): ridge heads, for batches that represent the data.

    The heads are the ridge solutions of the batch, and the networks descend on the losses *at*
    those solutions: in stage 2 the gradient passes through
    :math:`W^\star(\theta_X) = \arg\min_W \sum_i \|\psi_i - W^\top \phi_i\|^2 + \beta_1 \|W\|_F^2`.
    By Theorem 1 the dependence of each loss on its own head needs no derivative.

    Args:
      networks, treatment_optimizer, instrument_optimizer: as in `proximal`.
      beta1: penalty of W, multiplying a *sum* over samples; scalar, (d,) or (d, d).
      beta2: penalty of w.
      stage1_steps, stage2_steps, use_bias, penalize_bias, solver: as in `proximal`.

    Returns:
      The method.

    Raises:
      ValueError, TypeError: while tracing, for shapes and dtypes that do not fit.

    Examples:
      >>> import optax
      >>> from cfll.iv import Backbone
      >>> linear = Backbone(lambda w, stats, x, *, train: (x @ w, stats), jnp.ones((1, 8)))
      >>> method = original(
      ...     Networks(treatment=linear, instrument=linear), treatment_optimizer=optax.sgd(0.01),
      ...     instrument_optimizer=optax.sgd(0.01), beta1=1.0, beta2=1.0)

    References:
      Xu, Chen, Srinivasan, de Freitas, Doucet, Gretton: Learning Deep Features in Instrumental
      Variable Regression, ICLR 2021, arXiv:2010.07154.
    """
    _check_penalties(beta1=beta1, beta2=beta2)
    options: Any = {"penalize_bias": penalize_bias, "solver": solver}

    def inner(features, targets, anchor):
        del anchor
        return ridge_solve(features, targets, beta1, use_bias=use_bias, **options)

    return _method(
        networks,
        (instrument_optimizer, treatment_optimizer),
        (rules.ridge(beta1, **options), rules.ridge(beta2, **options)),
        inner=inner,
        order=SOLVE_THEN_DESCEND,
        steps=(stage1_steps, stage2_steps),
        use_bias=use_bias,
    )


def _check_penalties(**penalties: Any) -> None:
    """By the names that they have here."""
    for name, penalty in penalties.items():
        if not (isinstance(penalty, Rule) or callable(penalty)):
            check_value(name, penalty)


def _method(
    networks: Networks,
    optimizers: tuple[optax.GradientTransformation, optax.GradientTransformation],
    stage_rules: tuple[Rule, Rule],
    *,
    inner: Callable[..., LinearHead],
    order: str,
    steps: tuple[int, int],
    use_bias: bool,
) -> IVMethod:
    """The alternation that all methods share. `inner` is the head of stage 1 inside stage 2."""
    if min(steps) < 1:
        raise ValueError(f"stage1_steps and stage2_steps are {steps}; both must be at least 1.")
    optimizer1, optimizer2 = optimizers
    rule1, rule2 = stage_rules
    update = partial(_update, order == SOLVE_THEN_DESCEND)

    def init(batch: IVBatch) -> IVState:
        check_rows("batch", **batch._asdict())
        check_covariate(networks, batch.covariate)
        treatment, instrument = networks.treatment, networks.instrument
        params, stats = (treatment.params, None), (treatment.stats, None)
        psi = features_shape(treatment, batch.treatment, "treatment")
        phi = features_shape(instrument, batch.instrument, "instrument")
        d_combined = psi.shape[1]
        if networks.covariate is not None:
            covariate = networks.covariate
            xi = features_shape(covariate, batch.covariate, "covariate")
            d_combined = (psi.shape[1] + 1) * (xi.shape[1] + 1) - 1
            params, stats = (params[0], covariate.params), (stats[0], covariate.stats)
        outcome = outcome_of(batch)
        dtype = widest_dtype(psi, phi, outcome)
        head1 = LinearHead.zeros(phi.shape[1], psi.shape[1], use_bias, dtype)
        head2 = LinearHead.zeros(d_combined, outcome.shape[1], use_bias, dtype)
        return IVState(
            treatment=_start(params, stats, optimizer2),
            instrument=_start(instrument.params, instrument.stats, optimizer1),
            stage1=initial_state(rule1, head1, "stage1"),
            stage2=initial_state(rule2, head2, "stage2"),
        )

    def stage1_update(state, inputs, targets):
        def features_of(params):
            stats = state.instrument.stats
            return networks.instrument.apply(params, stats, given(inputs, "instrument"), train=True)

        instrument, head, loss = update(
            rule1, optimizer1, features_of, state.instrument, state.stage1, targets
        )
        return state._replace(instrument=instrument, stage1=head), loss

    def stage1_step(state: IVState, batch1: IVBatch) -> tuple[IVState, jax.Array]:
        check_rows("batch1", **batch1._asdict())
        targets = treatment_features(networks, state, batch1.treatment)
        return stage1_update(state, batch1.instrument, targets)

    def stage2_step(state: IVState, batch1: IVBatch, batch2: IVBatch) -> tuple[IVState, jax.Array]:
        check_rows("batch1", **batch1._asdict())
        check_rows("batch2", **batch2._asdict())
        check_covariate(networks, batch2.covariate)
        instrument1, instrument2 = (
            instrument_features(networks, state, batch.instrument) for batch in (batch1, batch2)
        )

        def features_of(params):
            stats = state.treatment.stats
            treatment1, new = networks.treatment.apply(
                params[0], stats[0], given(batch1.treatment, "treatment"), train=True
            )
            predicted = inner(instrument1, treatment1, state.stage1.anchor)(instrument2)
            if networks.covariate is None:
                return predicted, (new, None)
            covariate2, new2 = networks.covariate.apply(
                params[1], stats[1], given(batch2.covariate, "covariate"), train=True
            )
            return products(predicted, covariate2), (new, new2)

        treatment, head, loss = update(
            rule2, optimizer2, features_of, state.treatment, state.stage2, outcome_of(batch2)
        )
        return state._replace(treatment=treatment, stage2=head), loss

    def round_(
        state: IVState, batch1: IVBatch, batch2: IVBatch
    ) -> tuple[IVState, tuple[jax.Array, jax.Array]]:
        check_rows("batch1", **batch1._asdict())
        # Stage 1 does not move the treatment network: its targets are computed once.
        targets = treatment_features(networks, state, batch1.treatment)
        state, losses1 = jax.lax.scan(
            lambda state, _: stage1_update(state, batch1.instrument, targets),
            state,
            length=steps[0],
        )
        state, losses2 = jax.lax.scan(
            lambda state, _: stage2_step(state, batch1, batch2), state, length=steps[1]
        )
        return state, (losses1[-1], losses2[-1])

    return IVMethod(init, stage1_step, stage2_step, round_)


def _start(params: Any, stats: Any, optimizer: optax.GradientTransformation) -> NetState:
    """A network before training, copied: a state can be donated, and its source used again."""
    params, stats = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), (params, stats))
    return NetState(params, stats, optimizer.init(params))


def _update(
    solve_first: bool,
    rule: Rule,
    optimizer: optax.GradientTransformation,
    features_of: Callable[[Any], tuple[jax.Array, Any]],
    net: NetState,
    head: ClosedFormState,
    targets: jax.Array,
) -> tuple[NetState, ClosedFormState, jax.Array]:
    """One update of a network and of its head, and the loss; Eq. (17) or Algorithm 3."""

    def loss_fn(params):
        features, stats = features_of(params)
        if solve_first:
            loss, solution = rule.loss(features, targets, head)
        else:
            loss, solution = penalized_loss(head.anchor, features, targets), None
        return loss, (stats, solution)

    (loss, (stats, solution)), grads = jax.value_and_grad(loss_fn, has_aux=True)(net.params)
    # What line searches and rates that follow the loss ask for; the others take no notice.
    extra = {"value": loss, "grad": grads, "value_fn": lambda params: loss_fn(params)[0]}
    optimizer = optax.with_extra_args_support(optimizer)
    updates, opt_state = optimizer.update(grads, net.opt_state, net.params, **extra)
    params = optax.apply_updates(net.params, updates)
    if solution is None:  # a second forward pass, whose statistics are dropped: one move per batch
        solution = rule.solve(features_of(params)[0], targets, head)
    return NetState(params, stats, opt_state), advance(head, solution), loss
