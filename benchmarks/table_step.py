"""How long does a training step of an embedding table take, and does its size matter?

A call is `STEPS` steps: 4,096 examples of 10 ids each, their rows of width 32 side by side, an MLP
256-128-1 under Adam, and a sparse rule for the rows. Ids are uniform, so that nearly all of a step
are misses of the cache. All memory is touched before; every contestant has the same initial rows.
The bound has no dedup: rows are updated once for each place, wrong where an id comes twice. What it
takes less than "mtrec_jax rowwise_adagrad" is the price of exact updates.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

STEPS, _BATCHES, _BATCH, _IDS, _WIDTH, _RATE = 20, 100, 4096, 10, 32, 0.01
_LAYERS = (256, 128, 1)


class Size(NamedTuple):
    """One table."""

    rows: int


CASES = {
    "quick": (Size(20_000),),
    "table": (Size(100_000), Size(1_000_000), Size(10_000_000)),
}
BLAS: tuple[str, ...] = ()
BOUNDS = ("bound without dedup",)

Answer = tuple[list[float], np.ndarray]  # losses [STEPS] of the last call, rows of `watched`
Call = Callable[[], Answer]


class Problem(NamedTuple):
    """Batches that are gone through again and again."""

    size: int  # rows of the table, V
    ids: np.ndarray  # [batches, B, 10]
    labels: np.ndarray  # [batches, B]

    @property
    def watched(self) -> np.ndarray:
        """Ids of which some are in no batch."""
        return np.arange(0, self.size, max(1, self.size // 2000))


def problem(case: Size) -> Problem:
    """Uniform ids; labels that the rows tell from the start."""
    ids = np.random.default_rng(1).integers(0, case.rows, (_BATCHES, _BATCH, _IDS))
    labels = _rows(case.rows)[:, 0][ids].sum(axis=-1) > 0
    return Problem(case.rows, ids.astype(np.int32), labels.astype(np.float32))


def _rows(size: int) -> np.ndarray:
    """The table as it begins, [V, 32]; made anew for each use, as several would not fit."""
    rows = np.random.default_rng(0).random((size, _WIDTH), np.float32)
    rows -= 0.5
    return rows


def check(problem: Problem, answer: Answer) -> None:
    """The loss falls; rows of the first batches have moved, all others have not."""
    losses, rows = answer
    assert np.mean(losses[-4:]) < 0.98 * np.mean(losses[:4]), losses
    used = np.isin(problem.watched, problem.ids[:STEPS])
    moved = (rows != _rows(problem.size)[problem.watched]).any(axis=1)
    np.testing.assert_array_equal(moved, used)


# --- Ours


def _ours(name: str, dedup: bool = True) -> Callable[[Problem], Call]:
    def start(problem: Problem) -> Call:
        import functools

        import jax
        import jax.numpy as jnp
        import optax

        from mtrec_jax.tables.lookup import gather
        from mtrec_jax.tables.rules import RULES
        from mtrec_jax.tables.update import apply_rows

        rule, adam = RULES[name](), optax.adam(1e-3)
        dense = _layers(jnp)
        table = jnp.array(_rows(problem.size))
        state: Any = dense, adam.init(dense), table, rule.init(table)
        state = (*state, jnp.zeros(len(table), jnp.int32))
        ids, labels = jnp.asarray(problem.ids), jnp.asarray(problem.labels)

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state: Any, number: Any) -> Any:
            dense, moments, table, slots, scratch = state
            address, label = ids[number], labels[number]

            def loss(dense: Any, rows: Any) -> Any:
                x = rows.reshape(_BATCH, -1)
                for i, (kernel, bias) in enumerate(dense):
                    x = x @ kernel + bias
                    x = jax.nn.relu(x) if i < len(dense) - 1 else x
                return jnp.mean(optax.sigmoid_binary_cross_entropy(x[:, 0], label))

            rows = gather(table, address)
            value, (to_dense, to_rows) = jax.value_and_grad(loss, argnums=(0, 1))(dense, rows)
            updates, moments = adam.update(to_dense, moments)
            dense = optax.apply_updates(dense, updates)
            flat, grads = address.reshape(-1), to_rows.reshape(-1, _WIDTH)
            if dedup:
                table, slots, scratch = apply_rows(
                    rule, table, slots, scratch, flat, grads, _RATE, rows=rows.reshape(-1, _WIDTH)
                )
            else:
                old = jax.tree.map(lambda s: s[flat], slots)
                new, new_slots = rule.update(rows.reshape(-1, _WIDTH), old, grads, _RATE)
                table = table.at[flat].set(new)
                slots = jax.tree.map(lambda s, n: s.at[flat].set(n), slots, new_slots)
            return (dense, moments, table, slots, scratch), value

        watched, done = jnp.asarray(problem.watched), 0

        def call() -> Answer:
            nonlocal state, done
            losses = []
            for _ in range(STEPS):
                state, value = step(state, done % _BATCHES)
                losses.append(value)
                done += 1
            return [float(v) for v in losses], np.asarray(state[2][watched])

        return call

    return start


def _dense_optax(problem: Problem) -> Call:
    """What JAX users do without a row-wise rule: the gradient of the whole table."""
    if problem.size > 1_000_000:
        raise RuntimeError("left out beyond a million rows")
    import functools

    import jax
    import jax.numpy as jnp
    import optax

    adam = optax.adam(1e-3)
    params: Any = _layers(jnp), jnp.array(_rows(problem.size))
    moments = adam.init(params)
    ids, labels = jnp.asarray(problem.ids), jnp.asarray(problem.labels)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, moments: Any, number: Any) -> Any:
        def loss(params: Any) -> Any:
            dense, table = params
            x = table[ids[number]].reshape(_BATCH, -1)
            for i, (kernel, bias) in enumerate(dense):
                x = x @ kernel + bias
                x = jax.nn.relu(x) if i < len(dense) - 1 else x
            return jnp.mean(optax.sigmoid_binary_cross_entropy(x[:, 0], labels[number]))

        value, grads = jax.value_and_grad(loss)(params)
        updates, moments = adam.update(grads, moments)
        return optax.apply_updates(params, updates), moments, value

    watched, done = jnp.asarray(problem.watched), 0

    def call() -> Answer:
        nonlocal params, moments, done
        losses = []
        for _ in range(STEPS):
            params, moments, value = step(params, moments, done % _BATCHES)
            losses.append(value)
            done += 1
        return [float(v) for v in losses], np.asarray(params[1][watched])

    return call


def _layers(numpy: Any) -> list[tuple[Any, Any]]:
    rng, sizes = np.random.default_rng(1), (_IDS * _WIDTH, *_LAYERS)
    pairs = itertools.pairwise(sizes)
    return [
        (
            numpy.asarray(rng.standard_normal((n, m), np.float32) * np.float32(n**-0.5)),
            numpy.zeros(m, numpy.float32),
        )
        for n, m in pairs
    ]


# --- Theirs


def _torch(rule: str) -> Callable[[Problem], Call]:
    def start(problem: Problem) -> Call:
        torch = importlib.import_module("torch")
        rows = torch.from_numpy(_rows(problem.size))
        table = torch.nn.Embedding.from_pretrained(rows, freeze=False, sparse=True)
        if rule == "adagrad":
            sparse = torch.optim.Adagrad(
                table.parameters(), lr=_RATE, initial_accumulator_value=0.1, eps=1e-7
            )
        else:
            sparse = torch.optim.SparseAdam(list(table.parameters()), lr=_RATE)

        def look_up(ids: Any) -> Any:
            return table(ids).flatten(1)

        return _torch_steps(torch, problem, look_up, [sparse], lambda: table.weight)

    return start


def _fbgemm(problem: Problem) -> Call:
    """The CPU kernel of TorchRec: backward pass and update in one, row-wise Adagrad."""
    torch = importlib.import_module("torch")
    importlib.import_module("fbgemm_gpu")
    ops = importlib.import_module("fbgemm_gpu.split_table_batched_embeddings_ops_training")
    common = importlib.import_module("fbgemm_gpu.split_table_batched_embeddings_ops_common")
    table = ops.SplitTableBatchedEmbeddingBagsCodegen(
        [(problem.size, _WIDTH, common.EmbeddingLocation.HOST, ops.ComputeDevice.CPU)] * 1,
        optimizer=ops.OptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=_RATE,
        feature_table_map=[0] * _IDS,  # one id a feature: its rows stand side by side
    )
    weight = table.split_embedding_weights()[0]
    weight.copy_(torch.from_numpy(_rows(problem.size)))
    offsets = torch.arange(_BATCH * _IDS + 1, dtype=torch.int64)

    def look_up(ids: Any) -> Any:
        return table(ids.T.reshape(-1), offsets)

    return _torch_steps(torch, problem, look_up, [], lambda: table.split_embedding_weights()[0])


def _torch_steps(
    torch: Any,
    problem: Problem,
    look_up: Callable[[Any], Any],
    optimizers: list[Any],
    weight: Callable[[], Any],
) -> Call:
    parts: list[Any] = []
    for kernel, bias in _layers(np):
        linear = torch.nn.Linear(*kernel.shape)
        linear.weight.data = torch.from_numpy(kernel.T.copy())
        linear.bias.data = torch.from_numpy(bias)
        parts += [linear, torch.nn.ReLU()]
    dense = torch.nn.Sequential(*parts[:-1])
    optimizers = [*optimizers, torch.optim.Adam(dense.parameters(), lr=1e-3)]
    ids = torch.from_numpy(problem.ids.astype(np.int64))
    labels = torch.from_numpy(problem.labels)
    lossy = torch.nn.functional.binary_cross_entropy_with_logits
    watched, done = torch.from_numpy(problem.watched), 0

    def step() -> Any:
        nonlocal done
        for optimizer in optimizers:
            optimizer.zero_grad()
        number = done % _BATCHES
        loss = lossy(dense(look_up(ids[number]))[:, 0], labels[number])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        done += 1
        return loss.detach()

    first = [step()]
    for optimizer in optimizers:
        for state in optimizer.state.values():
            for value in state.values():
                if torch.is_tensor(value):
                    value.add_(0)  # memory that was promised is there from now on

    def call() -> Answer:
        losses = [first.pop() if first else step(), *(step() for _ in range(STEPS - 1))]
        return [float(v) for v in losses], weight().detach()[watched].numpy()

    return call


CONTESTANTS: dict[str, Callable[[Problem], Call]] = {
    "mtrec_jax adagrad": _ours("adagrad"),
    "mtrec_jax rowwise_adagrad": _ours("rowwise_adagrad"),
    "mtrec_jax lazy_adam": _ours("lazy_adam"),
    "torch Adagrad": _torch("adagrad"),
    "torch SparseAdam": _torch("adam"),
    "fbgemm rowwise_adagrad": _fbgemm,
    "optax dense adam": _dense_optax,
    "bound without dedup": _ours("rowwise_adagrad", dedup=False),
}
