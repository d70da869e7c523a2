"""One training step: a pure, jitted function that donates its state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mtrec_jax.balance import Balancer
from mtrec_jax.balance.contract import beside
from mtrec_jax.config import Experiment, Train
from mtrec_jax.errors import ConfigError
from mtrec_jax.models.model import Model
from mtrec_jax.sharding import AnyMesh, state_shardings
from mtrec_jax.tables.exchange import BuffersOf
from mtrec_jax.tables.layout import DENSE, initial_stacks, rule_of
from mtrec_jax.tables.lookup import Ticket, lookup
from mtrec_jax.tables.rules import RULES, RowOptimizer, at_rate, bounded
from mtrec_jax.tables.update import Updated, dense_gradient, new_scratch, update
from mtrec_jax.train.gradients import Given, backward, draw
from mtrec_jax.types import Batch, Catalogue, PyTree, TrainState


class Step(NamedTuple):
    """`init(seed) -> state`, `update(state, batch, catalogue) -> state`; `abstract` has the shapes
    and shardings of a state.

    A step whose loss, squared gradient or new parameters are not finite changes nothing but
    `state.bad`; with `train.not_finite = "stop"` neither do the steps after it.
    `inspect(state, batch, catalogue)` tells which losses and gradients of this batch are finite, by
    name, losses first.
    """

    abstract: TrainState
    init: Callable[[int], TrainState]
    update: Callable[[TrainState, Batch, Catalogue], TrainState]
    inspect: Callable[[TrainState, Batch, Catalogue], dict[str, bool]]


class Found(NamedTuple):
    """What a batch says, before anything is changed."""

    sums: dict[str, tuple[jax.Array, jax.Array]]  # {loss: (sum, weight)}
    to_params: PyTree  # gradients
    to_rows: dict[str, jax.Array]
    ticket: Ticket
    balance: PyTree
    drawing: PyTree


def make_step(
    experiment: Experiment,
    model: Model,
    mesh: AnyMesh,
    total_steps: int,
    optimizer: optax.GradientTransformation | None = None,
    buffers: BuffersOf | None = None,
) -> Step:
    """Compile the step of an experiment.

    Args:
      experiment: losses, balancing, learning rates.
      model: from `make_model` of the same experiment.
      mesh: devices; batches arrive split over them, `update` keeps the state's shardings. An
        abstract one gives shapes and shardings.
      total_steps: length of the learning-rate schedule.
      optimizer: optax chain for the dense parameters instead of the configured one.
      buffers: sizes of the exchange of rows by stack, as `capacity.measured_buffers` gives them.
    """
    config, rules = experiment.train, row_rules(experiment.train)
    devices = cast(Mesh, mesh)  # an abstract one never runs
    dense = optimizer or dense_optimizer(config, total_steps)
    packing = _Packing(_packed, _unpacked) if optimizer is None else _Packing(_same, _same)
    row_rate = learning_rate(config, config.row_learning_rate, total_steps)
    balancer = _balancer(experiment, model)

    find = _finder(experiment, model, mesh, balancer, buffers or {})

    def step(state: TrainState, batch: Batch, catalogue: Catalogue) -> TrainState:
        """`find`, and the update of the dense parameters and of the touched rows."""
        found = find(state, batch, catalogue)
        old, gradient = packing.pack(state.params), packing.pack(found.to_params)
        updates, optimizer_state = dense.update(gradient, state.optimizer, old)
        params = optax.apply_updates(old, updates)
        is_good = _all_finite((found.sums, _squares(gradient, found.to_rows), params))
        if config.not_finite == "stop":
            is_good &= state.bad[0] == 0
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 2)  # of bfloat16 rows
        stacks = Updated(state.tables, state.slots, state.scratch, state.rounds)
        # Steps that were left out move no schedule: optax has not seen them either.
        rate = row_rate(state.step - state.bad[0])
        taken = found.ticket, found.to_rows, rate, key, is_good, devices
        stacks = update(model.layout, rules, stacks, *taken)
        after, before = (
            (params, optimizer_state, found.balance, found.drawing, _added(state.sums, found.sums)),
            (old, state.optimizer, state.balance, state.drawing, state.sums),
        )
        kept = jax.tree.map(lambda a, b: jnp.where(is_good, a, b), after, before)
        packed, optimizer_state, balance, drawing, sums = kept
        step, bad = _counted(state, is_good, config.not_finite == "stop")
        return TrainState(
            params=packing.unpack(packed, state.params),
            **stacks._asdict(),
            optimizer=optimizer_state,
            balance=balance,
            drawing=drawing,
            key=state.key,
            step=step,
            sums=sums,
            bad=bad,
        )

    init = _initializer(experiment, model, mesh, dense, packing, balancer)
    shapes = jax.eval_shape(init, model.abstract, jax.random.key(0, impl="rbg"))
    shardings = state_shardings(shapes, mesh)
    compiled = jax.jit(init, out_shardings=shardings)
    return Step(
        abstract=jax.tree.map(_placed, shapes, shardings),
        init=lambda seed: compiled(model.init(seed), jax.random.key(seed, impl="rbg")),
        update=jax.jit(step, donate_argnums=0, out_shardings=shardings),
        inspect=functools.partial(_inspect, jax.jit(functools.partial(_finite, find))),
    )


def _finder(
    experiment: Experiment, model: Model, mesh: AnyMesh, balancer: Balancer, buffers: BuffersOf
) -> Callable[[TrainState, Batch, Catalogue], Found]:
    """The first half of a step."""

    devices = cast(Mesh, mesh)  # an abstract one never runs

    def find(state: TrainState, batch: Batch, catalogue: Catalogue) -> Found:
        """Lookup, losses, and their gradients combined."""
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), 3)
        batch = model.altered(batch, keys[0])
        wanted = model.ids(batch, catalogue, keys[0], state.drawing)
        stacks = state.tables | {n: state.params[n] for n in (DENSE,) if n in state.params}
        known = model.layout, stacks, state.scratch, wanted.ids, devices, buffers
        rows, ticket = lookup(*known)
        draws = draw(keys[1], batch)
        weights = model.weights(batch, draws.lottery)
        given = Given(state.params["network"], rows, batch, wanted, draws)

        def to_dense(to_rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
            if DENSE not in state.params:
                return {}
            return {DENSE: dense_gradient(model.layout, ticket, to_rows)}

        parts = experiment.train.accumulate
        taken = model, given, catalogue, weights, parts, devices, to_dense, balancer.at
        back = backward(*taken)
        observed = jnp.stack([weights[n] > 0 for n in model.names])
        combined, balance = balancer.combine(back.pullback, observed, state.balance, keys[2])
        to_params, to_rows, fusion = back.finish(combined)
        means = [*combined.losses, *[fusion] * model.fuses]
        sums = {n: (m * w, w) for m, (n, w) in zip(means, weights.items(), strict=True)}
        return Found(sums, to_params, to_rows, ticket, balance, wanted.drawing)

    return find


def model_shapes(experiment: Experiment, model: Model) -> tuple[PyTree, dict[str, Any]]:
    """Dense parameters and sparse stacks of a state, as shapes."""
    config = experiment.train

    def stacks() -> dict[str, jax.Array]:
        key, low = jax.random.key(0, impl="rbg"), config.row_precision == "bfloat16"
        return initial_stacks(model.layout, key, jnp.dtype(config.precision), low)

    tables = jax.eval_shape(stacks)
    dense = {n: tables.pop(n) for n in (DENSE,) if n in tables}
    return model.abstract | dense, tables


def _balancer(experiment: Experiment, model: Model) -> Balancer:
    """The configured balancing of the tasks, which starts from their declared weights, and losses
    of no task beside it."""
    config, tasks = experiment.train, experiment.tasks
    declared = [tasks[name].weight for name in model.names[: len(model.tasks)]]
    balancer = config.balance.make(jnp.array(declared, jnp.dtype(config.precision)))
    if config.accumulate > 1 and not balancer.in_parts:
        raise ConfigError(
            f"train.accumulate: {config.accumulate} parts, but train.balance.kind = "
            f"{config.balance.kind!r} needs the gradient of each task over the whole batch; set "
            'train.accumulate = 1, or train.balance.kind = "static"'
        )
    return beside(balancer, len(model.names) - len(model.tasks))


def _initializer(
    experiment: Experiment,
    model: Model,
    mesh: AnyMesh,
    dense: optax.GradientTransformation,
    packing: _Packing,
    balancer: Balancer,
) -> Callable[[PyTree, jax.Array], TrainState]:
    """Initial dense layers and a key -> the state of step 0."""
    config, dtype = experiment.train, jnp.dtype(experiment.train.precision)
    rules = row_rules(config)

    def init(params: PyTree, key: jax.Array) -> TrainState:
        key_tables, key_run = jax.random.split(key)
        low = config.row_precision == "bfloat16"
        tables = initial_stacks(model.layout, key_tables, dtype, low, mesh)
        params = params | {n: tables.pop(n) for n in (DENSE,) if n in tables}
        names = (*model.names, *["fusion"] * model.fuses)
        return TrainState(
            params=params,
            tables=tables,
            slots={stack: rules[rule_of(stack)].init(table) for stack, table in tables.items()},
            scratch=new_scratch(tables),
            optimizer=dense.init(packing.pack(params)),
            balance=balancer.init(params),
            drawing=model.drawing(),
            key=key_run,
            step=jnp.zeros((), jnp.int32),
            sums={name: jnp.zeros(2, dtype) for name in names},
            rounds=jnp.zeros((), jnp.int32),
            bad=jnp.zeros(2, jnp.int32),
        )

    return init


def _placed(shape: jax.ShapeDtypeStruct, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)


def row_rules(config: Train) -> dict[str, RowOptimizer]:
    """{name: rule} with the configured weight decay and clipping; FTRL knows no such decay."""
    rules = {name: rule() for name, rule in RULES.items()}
    rules["ftrl"] = at_rate(rules["ftrl"], config.row_learning_rate or config.learning_rate)
    decay = dict.fromkeys(rules, config.row_weight_decay) | {"ftrl": 0.0}
    return {name: bounded(rule, decay[name], config.row_clip_norm) for name, rule in rules.items()}


def _inspect(finite: Callable[..., dict[str, jax.Array]], *arguments: Any) -> dict[str, bool]:
    found = {name: bool(value) for name, value in finite(*arguments).items()}
    # A dictionary leaves `jax.jit` in the order of its keys.
    return dict(sorted(found.items(), key=lambda pair: not pair[0].startswith("the loss")))


def _finite(
    find: Callable[[TrainState, Batch, Catalogue], Found],
    state: TrainState,
    batch: Batch,
    catalogue: Catalogue,
) -> dict[str, jax.Array]:
    found = find(state, batch, catalogue)
    finite = {f"the loss of {n}": _all_finite(found.sums[n]) for n in found.sums}
    for name, tree in (("params", found.to_params), ("rows", found.to_rows)):
        for path, leaf in jax.tree.leaves_with_path(tree):
            finite[f"the gradient of {name}{_dotted(path)}"] = _all_finite(leaf)
    for path, square in jax.tree.leaves_with_path(_squares(found.to_params, found.to_rows)):
        finite[f"the squared gradient of {_dotted(path)[1:]}"] = _all_finite(square)
    return finite


def _dotted(path: tuple[Any, ...]) -> str:
    return "".join(f".{getattr(p, 'key', getattr(p, 'idx', p))}" for p in path)


class _Packing(NamedTuple):
    """How optax sees the dense parameters."""

    pack: Callable[[PyTree], PyTree]
    unpack: Callable[[PyTree, PyTree], PyTree]  # (packed, what it was made of)


def _packed(params: PyTree) -> PyTree:
    """The layers' parameters as one vector: a program of a few operations instead of some for each
    of a hundred arrays, which XLA takes a quarter of a minute to compile."""
    leaves = jax.tree.leaves(params["network"])
    return params | {"network": jnp.concatenate([leaf.reshape(-1) for leaf in leaves])}


def _unpacked(packed: PyTree, like: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(like["network"])
    parts = jax.lax.split(packed["network"], [leaf.size for leaf in leaves])
    parts = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    return packed | {"network": jax.tree.unflatten(structure, parts)}


def _same(params: PyTree, like: PyTree = None) -> PyTree:
    """An optimizer of the caller's own sees each array by its name and shape."""
    return params


def _counted(state: TrainState, is_good: jax.Array, stops: bool) -> tuple[jax.Array, jax.Array]:
    """The step that follows, and `bad`: the number of bad steps, and which was the first of them,
    or the last if none stops."""
    step = state.step + 1
    which = jnp.where(stops & (state.bad[0] > 0), state.bad[1], step)
    bad = jnp.where(is_good, state.bad, jnp.stack([state.bad[0] + 1, which]))
    return step, bad


def _added(
    sums: dict[str, jax.Array], found: dict[str, tuple[jax.Array, jax.Array]]
) -> dict[str, jax.Array]:
    return {name: total + jnp.stack(found[name]) for name, total in sums.items()}


def _all_finite(tree: PyTree) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _squares(to_params: PyTree, to_rows: dict[str, jax.Array]) -> dict[str, PyTree]:
    """Finite only where all gradients are, and their squares, which optimizers add up.

    All gradients of a group's rows may belong to one row of a stack.
    """
    return {
        "params": jax.tree.map(lambda gradient: jnp.sum(jnp.square(gradient)), to_params),
        "rows": jax.tree.map(lambda gradient: jnp.square(jnp.sum(jnp.abs(gradient))), to_rows),
    }


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
