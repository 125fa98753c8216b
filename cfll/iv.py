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

`proximal` is Algorithm 3 of the paper, `original` the method of Xu et al. (2020). Both are a few
pure functions over one state, in the spirit of Optax. Beside `transform.py`: uses kernels, losses
and statistics, knows no Flax (`cfll.flax` wraps its modules).
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from cfll import objectives, solve
from cfll.cg import CG
from cfll.heads import LinearHead, accept_finite, widest_dtype
from cfll.stats import GramStats

# Networks, data and state -------------------------------------------------------------------------


class ApplyFn(Protocol):
    """The signature of `Backbone.apply`."""

    def __call__(
        self, params: Any, stats: Any, inputs: Any, *, train: bool
    ) -> tuple[jax.Array, Any]:
        """Features (n, d) of the inputs, and the statistics after this pass."""
        ...


class Backbone(NamedTuple):
    """A network without head: its function and its initial values.

    `cfll.flax.linen_backbone` and `cfll.flax.nnx_backbone` make one from a Flax module.

    Attributes:
      apply: ``apply(params, stats, inputs, *, train) -> (features, stats)``, features (n, d).
      params: what the optimizer trains.
      stats: what the forward pass updates (batch norm, spectral norm); ``None`` or a pytree.

    Examples:
      >>> import jax.numpy as jnp
      >>> def apply(params, stats, inputs, *, train):
      ...     return jnp.tanh(inputs @ params), stats
      >>> backbone = Backbone(apply, params=jnp.ones((3, 8)))
    """

    apply: ApplyFn
    params: Any
    stats: Any = None


class Networks(NamedTuple):
    r"""The backbones of the two stages.

    Attributes:
      treatment: :math:`\psi`, features of the treatment x.
      instrument: :math:`\phi`, features of the instrument z.
      covariate: :math:`\xi`, features of the observed covariates c, or ``None``.
    """

    treatment: Backbone
    instrument: Backbone
    covariate: Backbone | None = None


class IVBatch(NamedTuple):
    """Samples, all with the same leading axis. Stage 1 needs no outcome, stage 2 no treatment.

    Attributes:
      instrument: z, (n, ...).
      treatment: x, (n, ...), or ``None``.
      outcome: y, (n, o), floats, or ``None``.
      covariate: c, (n, ...), or ``None``. If the instrument is only valid given c, c is part of
        the instrument, too.
    """

    instrument: Any
    treatment: Any = None
    outcome: Any = None
    covariate: Any = None


class NetState(NamedTuple):
    """One network during training.

    Attributes:
      params: its parameters.
      stats: its running statistics, or ``None``.
      opt_state: the state of its optimizer.
    """

    params: Any
    stats: Any
    opt_state: Any


class IVState(NamedTuple):
    """All that training changes; one pytree, so it checkpoints.

    Attributes:
      treatment: of the treatment network (with covariates, of the pair of both networks).
      instrument: of the instrument network.
      stage1: W, from instrument features to treatment features.
      stage2: w, from treatment features (with covariates: products) to outcomes.
      count1: stage-1 updates so far, int32.
      count2: stage-2 updates so far, int32.
      info1: how W was solved last.
      info2: how w was solved last.
      skipped: heads that were not finite and therefore not used, int32. A batch with NaN moves the
        networks all the same: protect them with ``optax.apply_if_finite``.
    """

    treatment: NetState
    instrument: NetState
    stage1: LinearHead
    stage2: LinearHead
    count1: jax.Array
    count2: jax.Array
    info1: solve.SolveInfo
    info2: solve.SolveInfo
    skipped: jax.Array


class IVMethod(NamedTuple):
    """A method as pure functions over an `IVState`. Losses are means over samples.

    Attributes:
      init: ``init(batch) -> state``; the batch (all four fields that are used) sets the shapes.
      stage1: ``stage1(state, batch1) -> (state, loss)``, one update of instrument network and W.
      stage2: ``stage2(state, batch1, batch2) -> (state, loss)``, one update of the treatment
        network and w; W is solved on ``batch1``, the outcome predicted on ``batch2``.
      round: ``round(state, batch1, batch2) -> (state, (loss1, loss2))``, T_1 updates of stage 1 and
        T_2 of stage 2 on the same two batches; the losses are those before the last update.
    """

    init: Callable[[IVBatch], IVState]
    stage1: Callable[[IVState, IVBatch], tuple[IVState, jax.Array]]
    stage2: Callable[[IVState, IVBatch, IVBatch], tuple[IVState, jax.Array]]
    round: Callable[[IVState, IVBatch, IVBatch], tuple[IVState, tuple[jax.Array, jax.Array]]]


# Methods ------------------------------------------------------------------------------------------


def proximal(
    networks: Networks,
    *,
    treatment_optimizer: optax.GradientTransformation,
    instrument_optimizer: optax.GradientTransformation,
    lam1: jax.typing.ArrayLike,
    lam2: jax.typing.ArrayLike,
    lam12: jax.typing.ArrayLike = 1e-4,
    stage1_steps: int = 20,
    stage2_steps: int = 1,
    use_bias: bool = True,
    penalize_bias: bool = True,
    solver: str | CG = "auto",
) -> IVMethod:
    r"""DFIV with proximal heads, Algorithm 3: works with mini-batches.

    Both heads are kept near their previous values. Stage 1, lines 8 and 9, and stage 2, lines 11 to
    14, each move the network with the old head and then solve the head on its new features:

    .. math::
        \theta_Z &\leftarrow \theta_Z - \alpha \nabla \mathcal L^{(1)}(W, \theta_Z), &
        W &\leftarrow \arg\min_W \textstyle\sum_i \|\psi_i - W^\top \phi_i\|^2
            + \lambda_1 \|W - W_t\|_F^2 \\
        \theta_X &\leftarrow \theta_X - \alpha \nabla \mathcal L^{(2)}(w, \theta_X), &
        w &\leftarrow \arg\min_w \textstyle\sum_i \|y_i - w^\top W^{\star\top} \phi_i\|^2
            + \lambda_2 \|w - w_t\|^2

    where :math:`W^\star(\theta_X)` is solved with :math:`\lambda_{1,2}`. It is linear in the
    treatment features, so its derivative is one more solve with the factor at hand; no
    factorization is ever differentiated.

    Args:
      networks: the backbones.
      treatment_optimizer: trains treatment and covariate network.
      instrument_optimizer: trains the instrument network.
      lam1: proximal coefficient of W, multiplying a *sum* over samples; scalar, (d,) or (d, d).
      lam2: proximal coefficient of w.
      lam12: proximal coefficient of :math:`W^\star(\theta_X)`; the paper found that it has to be
        small.
      stage1_steps: T_1, updates of stage 1 in a round.
      stage2_steps: T_2, updates of stage 2 in a round.
      use_bias: whether both heads have an intercept.
      penalize_bias: as in `cfll.prox_solve`.
      solver: as in `cfll.prox_solve`.

    Returns:
      The method.

    Raises:
      ValueError, TypeError: while tracing, for shapes and dtypes that do not fit.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> def apply(params, stats, inputs, *, train):
      ...     return jnp.tanh(inputs @ params), stats
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> z, noise, confounder = jax.random.normal(keys[0], (3, 64, 1))
      >>> x = z + confounder
      >>> batch = IVBatch(instrument=z, treatment=x, outcome=x + confounder)
      >>> method = proximal(
      ...     Networks(Backbone(apply, jax.random.normal(keys[1], (1, 8))),
      ...              Backbone(apply, jax.random.normal(keys[2], (1, 8)))),
      ...     treatment_optimizer=optax.sgd(0.01), instrument_optimizer=optax.sgd(0.01),
      ...     lam1=1.0, lam2=1.0)
      >>> state, losses = jax.jit(method.round)(method.init(batch), batch, batch)
      >>> int(state.count1), int(state.count2)
      (20, 1)

    References:
      Closed-Form Last Layer Optimization, Algorithm 3.
    """
    prox = partial(solve.penalized_solve, penalize_bias=penalize_bias, solver=solver)

    def loss_at_anchor(features, targets, anchor):
        return jnp.mean(jnp.sum(jnp.square(targets - anchor(features)), axis=-1)), anchor

    def inner(features, targets, anchor):
        return prox(features, targets, anchor, lam12, name="lam12")[0]

    return _method(
        networks,
        treatment_optimizer,
        instrument_optimizer,
        stage1=_Stage(loss_at_anchor, partial(prox, penalty=lam1, name="lam1")),
        stage2=_Stage(loss_at_anchor, partial(prox, penalty=lam2, name="lam2")),
        inner=inner,
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
    By Theorem 1 the dependence of each loss on its own head needs no derivative. The heads in the
    state are those of the last solves, at the parameters before the update.

    Args:
      networks: the backbones.
      treatment_optimizer: trains treatment and covariate network.
      instrument_optimizer: trains the instrument network.
      beta1: penalty of W, multiplying a *sum* over samples; scalar, (d,) or (d, d).
      beta2: penalty of w.
      stage1_steps: updates of stage 1 in a round.
      stage2_steps: updates of stage 2 in a round.
      use_bias: whether both heads have an intercept.
      penalize_bias: as in `cfll.ridge_solve`.
      solver: as in `cfll.ridge_solve`.

    Returns:
      The method.

    Raises:
      ValueError, TypeError: while tracing, for shapes and dtypes that do not fit.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> def apply(params, stats, inputs, *, train):
      ...     return jnp.tanh(inputs @ params), stats
      >>> method = original(
      ...     Networks(Backbone(apply, jnp.ones((1, 8))), Backbone(apply, jnp.ones((1, 8)))),
      ...     treatment_optimizer=optax.sgd(0.01), instrument_optimizer=optax.sgd(0.01),
      ...     beta1=1.0, beta2=1.0)

    References:
      Xu, Chen, Srinivasan, de Freitas, Doucet, Gretton: Learning Deep Features in Instrumental
      Variable Regression, ICLR 2021, arXiv:2010.07154.
    """
    options: Any = {"use_bias": use_bias, "penalize_bias": penalize_bias, "solver": solver}

    def loss_at_ridge_head(features, targets, anchor, beta):
        del anchor
        return objectives.ridge_loss(features, targets, beta, **options)

    def inner(features, targets, anchor):
        del anchor
        return solve.ridge_solve(features, targets, beta1, **options)

    return _method(
        networks,
        treatment_optimizer,
        instrument_optimizer,
        stage1=_Stage(partial(loss_at_ridge_head, beta=beta1), None),
        stage2=_Stage(partial(loss_at_ridge_head, beta=beta2), None),
        inner=inner,
        steps=(stage1_steps, stage2_steps),
        use_bias=use_bias,
    )


class _Stage(NamedTuple):
    """How one stage follows its head.

    Attributes:
      loss: ``loss(features, targets, anchor) -> (loss, head)``: what the network descends on, and
        the head that the loss was taken at.
      head: ``head(features, targets, anchor) -> (head, info)``, solved on the features of the
        updated network; ``None``: keep the head of the loss, and save the second forward pass.
    """

    loss: Callable[..., tuple[jax.Array, LinearHead]]
    head: Callable[..., tuple[LinearHead, solve.SolveInfo]] | None


def _method(
    networks: Networks,
    treatment_optimizer: optax.GradientTransformation,
    instrument_optimizer: optax.GradientTransformation,
    *,
    stage1: _Stage,
    stage2: _Stage,
    inner: Callable[..., LinearHead],
    steps: tuple[int, int],
    use_bias: bool,
) -> IVMethod:
    """The alternation that both methods share. `inner` is the head of stage 1 inside stage 2."""
    if min(steps) < 1:
        raise ValueError(f"stage1_steps and stage2_steps are {steps}; both must be at least 1.")

    def init(batch: IVBatch) -> IVState:
        pair, instrument = _pair(networks), networks.instrument
        psi = _features(networks.treatment, batch.treatment, "treatment")
        phi = _features(instrument, batch.instrument, "instrument")
        d_combined = psi.shape[1]
        if networks.covariate is not None:
            xi = _features(networks.covariate, batch.covariate, "covariate")
            d_combined = (psi.shape[1] + 1) * (xi.shape[1] + 1) - 1
        outcome = _outcome(batch)
        dtype = widest_dtype(psi, phi, outcome)
        return IVState(
            treatment=_start(pair.params, pair.stats, treatment_optimizer),
            instrument=_start(instrument.params, instrument.stats, instrument_optimizer),
            stage1=LinearHead.zeros(phi.shape[1], psi.shape[1], use_bias, dtype),
            stage2=LinearHead.zeros(d_combined, outcome.shape[1], use_bias, dtype),
            count1=jnp.zeros((), jnp.int32),
            count2=jnp.zeros((), jnp.int32),
            info1=solve.given(),
            info2=solve.given(),
            skipped=jnp.zeros((), jnp.int32),
        )

    def stage1_step(state: IVState, batch1: IVBatch) -> tuple[IVState, jax.Array]:
        return stage1_update(state, batch1.instrument, treatment_features(state, batch1))

    def treatment_features(state: IVState, batch: IVBatch) -> jax.Array:
        """The targets of stage 1: evaluated, not trained."""
        features, _ = networks.treatment.apply(
            state.treatment.params[0], state.treatment.stats[0], batch.treatment, train=False
        )
        return features

    def stage1_update(state, inputs, targets):
        net = state.instrument

        def features_of(params):
            return networks.instrument.apply(params, net.stats, inputs, train=True)

        net, head, info, rejected, loss = _update(
            stage1, instrument_optimizer, features_of, net, targets, state.stage1
        )
        state = state._replace(
            instrument=net,
            stage1=head,
            count1=state.count1 + 1,
            info1=info,
            skipped=state.skipped + rejected,
        )
        return state, loss

    def stage2_step(state: IVState, batch1: IVBatch, batch2: IVBatch) -> tuple[IVState, jax.Array]:
        net = state.treatment

        def instrument_features(inputs):
            return networks.instrument.apply(
                state.instrument.params, state.instrument.stats, inputs, train=False
            )[0]

        instrument1, instrument2 = map(instrument_features, (batch1.instrument, batch2.instrument))

        def features_of(params):
            treatment1, stats = networks.treatment.apply(
                params[0], net.stats[0], batch1.treatment, train=True
            )
            predicted = inner(instrument1, treatment1, state.stage1)(instrument2)
            if networks.covariate is None:
                return predicted, (stats, None)
            covariate2, covariate_stats = networks.covariate.apply(
                params[1], net.stats[1], batch2.covariate, train=True
            )
            return _products(predicted, covariate2), (stats, covariate_stats)

        net, head, info, rejected, loss = _update(
            stage2, treatment_optimizer, features_of, net, _outcome(batch2), state.stage2
        )
        state = state._replace(
            treatment=net,
            stage2=head,
            count2=state.count2 + 1,
            info2=info,
            skipped=state.skipped + rejected,
        )
        return state, loss

    def round_(
        state: IVState, batch1: IVBatch, batch2: IVBatch
    ) -> tuple[IVState, tuple[jax.Array, jax.Array]]:
        # Stage 1 does not move the treatment network: its targets are computed once.
        targets = treatment_features(state, batch1)
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


# Evaluation ---------------------------------------------------------------------------------------


def predict(
    networks: Networks,
    state: IVState,
    treatment: Any,
    covariate: Any = None,
    *,
    stage2: LinearHead | None = None,
) -> jax.Array:
    r"""The structural function :math:`f(x) = w^\top \psi(x)`, or :math:`f(x, c)`.

    Args:
      networks: the backbones.
      state: what was trained; networks are evaluated, ``train=False``.
      treatment: x, (n, ...).
      covariate: c, (n, ...), if there is a covariate network.
      stage2: another head than the current one, e.g. that of `refit`.

    Returns:
      Outcomes (n, o).

    Raises:
      ValueError: if covariates are missing.
    """
    psi, _ = networks.treatment.apply(
        state.treatment.params[0], state.treatment.stats[0], treatment, train=False
    )
    head = state.stage2 if stage2 is None else stage2
    return head(_with_covariates(networks, state, psi, covariate))


def refit(
    networks: Networks,
    state: IVState,
    stage1_data: Iterable[IVBatch],
    stage2_data: Iterable[IVBatch],
    beta: jax.typing.ArrayLike = 0.01,
    *,
    penalize_bias: bool = True,
) -> tuple[LinearHead, LinearHead]:
    """Both heads by ridge on all data, through `cfll.GramStats`: Xu et al.'s way of evaluating.

    Args:
      networks: the backbones.
      state: what was trained; networks are evaluated, ``train=False``.
      stage1_data: batches of instrument and treatment, of any sizes; read once.
      stage2_data: batches of instrument and outcome (and covariate); read once.
      beta: penalty on a *sum* over samples, of both heads.
      penalize_bias: as in `cfll.ridge_solve`.

    Returns:
      W and w; pass w to `predict` as ``stage2``.

    Raises:
      ValueError: if there are no batches, or data are missing from one.
    """
    use_bias, dtype = state.stage1.bias is not None, state.stage1.kernel.dtype

    def instrument_features(batch: IVBatch) -> jax.Array:
        return networks.instrument.apply(
            state.instrument.params, state.instrument.stats, batch.instrument, train=False
        )[0]

    d, o = state.stage1.kernel.shape
    sums1 = GramStats.zeros(d, o, use_bias, dtype)
    for batch in stage1_data:
        targets, _ = networks.treatment.apply(
            state.treatment.params[0], state.treatment.stats[0], batch.treatment, train=False
        )
        sums1 = sums1.add(instrument_features(batch), targets)
    stage1 = sums1.ridge(beta, penalize_bias=penalize_bias)

    d, o = state.stage2.kernel.shape
    sums2 = GramStats.zeros(d, o, use_bias, dtype)
    for batch in stage2_data:
        psi = stage1(instrument_features(batch))
        features = _with_covariates(networks, state, psi, batch.covariate)
        sums2 = sums2.add(features, _outcome(batch))
    return stage1, sums2.ridge(beta, penalize_bias=penalize_bias)


# Pieces -------------------------------------------------------------------------------------------


class _Pair(NamedTuple):
    """Treatment and covariate network, which stage 2 trains together."""

    params: tuple[Any, Any]
    stats: tuple[Any, Any]


def _pair(networks: Networks) -> _Pair:
    treatment, covariate = networks.treatment, networks.covariate
    if covariate is None:
        return _Pair((treatment.params, None), (treatment.stats, None))
    return _Pair((treatment.params, covariate.params), (treatment.stats, covariate.stats))


def _start(params: Any, stats: Any, optimizer: optax.GradientTransformation) -> NetState:
    """A network before training, copied: a state can be donated, and its source used again."""
    params, stats = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), (params, stats))
    return NetState(params, stats, optimizer.init(params))


def _update(
    stage: _Stage,
    optimizer: optax.GradientTransformation,
    features_of: Callable[[Any], tuple[jax.Array, Any]],
    net: NetState,
    targets: jax.Array,
    anchor: LinearHead,
) -> tuple[NetState, LinearHead, solve.SolveInfo, jax.Array, jax.Array]:
    """One update of a network and of its head: lines 8 and 9, or 12 to 14, of Algorithm 3.

    Returns:
      The network, the head, how it was solved, whether it was rejected (int32), and the loss.
    """

    def loss_fn(params):
        features, stats = features_of(params)
        loss, head = stage.loss(features, targets, anchor)
        return loss, (stats, head)

    (loss, (stats, head)), grads = jax.value_and_grad(loss_fn, has_aux=True)(net.params)
    updates, opt_state = optimizer.update(grads, net.opt_state, net.params)
    params = optax.apply_updates(net.params, updates)
    info = solve.given()
    if stage.head is not None:
        head, info = stage.head(features_of(params)[0], targets, anchor)
    head, accepted = accept_finite(head, anchor)
    return NetState(params, stats, opt_state), head, info, (~accepted).astype(jnp.int32), loss


def _with_covariates(
    networks: Networks, state: IVState, treatment_features: jax.Array, covariate: Any
) -> jax.Array:
    """What the head of stage 2 sees, all networks evaluated."""
    if networks.covariate is None:
        return treatment_features
    if covariate is None:
        raise ValueError("there is a covariate network, but no covariate: write covariate=c.")
    xi, _ = networks.covariate.apply(
        state.treatment.params[1], state.treatment.stats[1], covariate, train=False
    )
    return _products(treatment_features, xi)


def _products(treatment: jax.Array, covariate: jax.Array) -> jax.Array:
    """(psi, 1) x (xi, 1) without the last product, 1: that one is the bias."""
    products = treatment[:, :, None] * covariate[:, None, :]
    return jnp.concatenate([products.reshape(len(treatment), -1), treatment, covariate], axis=1)


def _features(backbone: Backbone, inputs: Any, name: str) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a backbone's features."""
    if inputs is None:
        raise ValueError(f"the batch has no {name}: write IVBatch(..., {name}=...).")
    features, _ = jax.eval_shape(
        partial(backbone.apply, train=False), backbone.params, backbone.stats, inputs
    )
    if len(features.shape) != 2:
        raise ValueError(
            f"the {name} network returned features of shape {features.shape}; expected (n, d): "
            "one row per sample."
        )
    return features


def _outcome(batch: IVBatch) -> jax.Array:
    if batch.outcome is None:
        raise ValueError(
            "stage 2 needs outcomes: write IVBatch(..., outcome=y), y of shape (n, o)."
        )
    outcome = jnp.asarray(batch.outcome)
    if outcome.ndim != 2:
        raise ValueError(f"outcome has shape {outcome.shape}; expected (n, o): write y[:, None].")
    return outcome
