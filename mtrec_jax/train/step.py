"""One training step: a pure, jitted function that donates its state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtrec_jax.balance.balance import static, uncertainty
from mtrec_jax.config import Experiment, Train
from mtrec_jax.data.dataset import Manifest
from mtrec_jax.models.model import Model
from mtrec_jax.sharding import state_shardings
from mtrec_jax.tables.layout import rule_of
from mtrec_jax.tables.lookup import BuffersOf, apply_gradients, new_scratch
from mtrec_jax.tables.update import RULES, RowOptimizer, at_rate, bounded
from mtrec_jax.train.gradients import Differentiate, Differentiated, make_differentiate
from mtrec_jax.train.objective import loss_names
from mtrec_jax.types import Batch, Catalogue, PyTree, TrainState


class Step(NamedTuple):
    """`init(key) -> state`, `update(state, batch, catalogue) -> state`; both are compiled once.
    `abstract` has the shapes and shardings of a state.

    A step whose loss, squared gradient or new parameters are not finite changes nothing
    but `state.bad`; with `train.not_finite = "stop"` neither do the steps after it.
    `inspect(state, batch, catalogue)` tells which losses and gradients of this batch are finite,
    by name, losses first.
    """

    abstract: TrainState
    init: Callable[[jax.Array], TrainState]
    update: Callable[[TrainState, Batch, Catalogue], TrainState]
    inspect: Callable[[TrainState, Batch, Catalogue], dict[str, bool]]


def make_step(
    experiment: Experiment,
    manifest: Manifest,
    model: Model,
    mesh: jax.sharding.Mesh,
    total_steps: int,
    optimizer: optax.GradientTransformation | None = None,
    buffers: BuffersOf | None = None,
) -> Step:
    """Compile the step of an experiment.

    Args:
      experiment: losses, balancing, learning rates.
      manifest: of the prepared data.
      model: from `make_model` of the same experiment and manifest.
      mesh: devices; batches arrive split over them, `update` keeps the state's shardings.
      total_steps: length of the learning-rate schedule.
      optimizer: optax chain for the dense parameters instead of the configured one.
      buffers: sizes of the exchange of rows by stack, as `capacity.measured_buffers` gives them.
    """
    config, buffers = experiment.train, buffers or {}
    dense = optimizer or dense_optimizer(config, total_steps)
    row_schedule = learning_rate(config, config.row_learning_rate, total_steps)
    rules = row_rules(config)
    names, initial = loss_names(experiment), _initial_weights(experiment)
    balancer = {"static": static, "uncertainty": uncertainty}[config.balance](initial)

    def init(key: jax.Array) -> TrainState:
        key_model, key_run = jax.random.split(key)
        params, tables = model.init(key_model, mesh)
        return TrainState(
            params=params,
            tables=tables,
            slots={stack: rules[rule_of(stack)].init(table) for stack, table in tables.items()},
            scratch=new_scratch(tables),
            optimizer=dense.init(params),
            balance=balancer.init(),
            key=key_run,
            step=jnp.zeros((), jnp.int32),
            sums={name: jnp.zeros(2, initial.dtype) for name in names},
            rounds=jnp.zeros((), jnp.int32),
            bad=jnp.zeros(2, jnp.int32),
        )

    differentiate = make_differentiate(experiment, manifest, model, mesh, balancer, buffers)

    def update(state: TrainState, batch: Batch, catalogue: Catalogue) -> TrainState:
        found = differentiate(state, batch, catalogue)
        updates, optimizer_state = dense.update(found.to_params, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        is_good = _all_finite((found.sums, _squares(found), params))
        if config.not_finite == "stop":
            is_good &= state.bad[0] == 0
        rate = row_schedule(state.step)
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 2)  # of bfloat16 rows
        given = found.fetched, found.to_rows, rate, key, is_good, mesh
        tables = apply_gradients(rules, state, *given)
        new = {
            "params": params,
            "optimizer": optimizer_state,
            "balance": found.balance,
            "sums": {n: state.sums[n] + jnp.stack(found.sums[n]) for n in names},
        }
        return _after(state, is_good, new, config.not_finite == "stop")._replace(**tables)

    shapes = jax.eval_shape(init, jax.random.key(0, impl="rbg"))
    shardings = state_shardings(shapes, mesh)
    return Step(
        abstract=jax.tree.map(_placed, shapes, shardings),
        init=jax.jit(init, out_shardings=shardings),
        update=jax.jit(update, donate_argnums=0, out_shardings=shardings),
        inspect=functools.partial(_inspect, jax.jit(functools.partial(_finite, differentiate))),
    )


def _placed(shape: jax.ShapeDtypeStruct, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)


def row_rules(config: Train) -> dict[str, RowOptimizer]:
    """{name: rule} with the configured weight decay and clipping."""
    rules = {name: rule() for name, rule in RULES.items()}
    rules["ftrl"] = at_rate(rules["ftrl"], config.row_learning_rate or config.learning_rate)
    return {
        name: bounded(rule, config.row_weight_decay, config.row_clip_norm)
        for name, rule in rules.items()
    }


def _inspect(finite: Callable[..., dict[str, jax.Array]], *arguments: Any) -> dict[str, bool]:
    found = {name: bool(value) for name, value in finite(*arguments).items()}
    # A dictionary leaves `jax.jit` in the order of its keys.
    return dict(sorted(found.items(), key=lambda pair: not pair[0].startswith("the loss")))


def _finite(
    differentiate: Differentiate,
    state: TrainState,
    batch: Batch,
    catalogue: Catalogue,
) -> dict[str, jax.Array]:
    found = differentiate(state, batch, catalogue)
    finite = {f"the loss of {n}": _all_finite(found.sums[n]) for n in found.sums}
    for name, tree in (("params", found.to_params), ("rows", found.to_rows)):
        for path, leaf in jax.tree.leaves_with_path(tree):
            finite[f"the gradient of {name}{_dotted(path)}"] = _all_finite(leaf)
    for path, square in jax.tree.leaves_with_path(_squares(found)):
        finite[f"the squared gradient of {_dotted(path)[1:]}"] = _all_finite(square)
    return finite


def _dotted(path: tuple[Any, ...]) -> str:
    return "".join(f".{getattr(p, 'key', getattr(p, 'idx', p))}" for p in path)


def _after(
    state: TrainState, is_good: jax.Array, new: dict[str, PyTree], stops: bool
) -> TrainState:
    """The state with the new parts, or with its own and one bad step more.

    `state.bad` holds their number, and which was the first of them, or the last if none stops.
    """
    old = {name: getattr(state, name) for name in new}
    kept = jax.tree.map(lambda after, before: jnp.where(is_good, after, before), new, old)
    step = state.step + 1
    which = jnp.where(stops & (state.bad[0] > 0), state.bad[1], step)
    bad = jnp.where(is_good, state.bad, jnp.stack([state.bad[0] + 1, which]))
    return state._replace(**kept, step=step, bad=bad)


def _all_finite(tree: PyTree) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _squares(found: Differentiated) -> dict[str, PyTree]:
    """Finite only where all gradients are, and their squares, which optimizers add up.

    All gradients of a stack's rows may belong to one row.
    """
    return {
        "params": jax.tree.map(lambda gradient: jnp.sum(jnp.square(gradient)), found.to_params),
        "rows": {
            stack: jnp.square(sum(jnp.sum(jnp.abs(gradient)) for gradient in by_role.values()))
            for stack, by_role in found.to_rows.items()
        },
    }


def _initial_weights(experiment: Experiment) -> jax.Array:
    """Declared weight of each loss, 1 for the fusion: [T]."""
    names = loss_names(experiment)
    declared = [experiment.tasks[n].weight if n in experiment.tasks else 1.0 for n in names]
    return jnp.array(declared, jnp.dtype(experiment.train.precision))


def learning_rate(config: Train, peak: float, total_steps: int) -> optax.Schedule:
    """The configured schedule with a linear warm-up before it; peak 0: the dense parameters'."""
    peak = peak or config.learning_rate
    after = max(1, total_steps - config.warmup_steps)
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, after)
    elif config.schedule == "linear":
        main = optax.linear_schedule(peak, 0.0, after)
    else:
        main = optax.constant_schedule(peak)
    if not config.warmup_steps:
        return main
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warmup, main], [config.warmup_steps])


def dense_optimizer(config: Train, total_steps: int) -> optax.GradientTransformation:
    """The configured optax chain for dense parameters."""
    rate = learning_rate(config, config.learning_rate, total_steps)
    rule = {
        "adam": lambda: optax.adam(rate),
        "adamw": lambda: optax.adamw(rate, weight_decay=config.weight_decay),
        "adagrad": lambda: optax.adagrad(rate),
        "sgd": lambda: optax.sgd(rate),
    }[config.optimizer]()
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, rule)
