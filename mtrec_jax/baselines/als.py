"""Implicit-feedback matrix factorisation by alternating least squares.

Hu, Koren and Volinsky (2008), "Collaborative filtering for implicit feedback datasets", with the
objective and regularisation of Rendle et al. (2022), "Revisiting the performance of iALS on item
recommendation benchmarks": over users u, items i and the pairs S that are liked,

  sum over S of (1 - <u, i>)^2 + unobserved * sum over all pairs of <u, i>^2
    + regularization * (sum over u of (n_u + unobserved * N)^frequency |u|^2, and so for items)

With one side fixed, each row of the other is a linear system of its own, solved by a few steps of
conjugate gradients from where the last epoch left it: Takács, Pilászy and Tikk (2011),
"Applications of the conjugate gradient method for implicit feedback collaborative filtering".
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32, Int, Int64
from pydantic import Field

from mtrec_jax.baselines.contract import Interactions, check_ids, most_similar
from mtrec_jax.baselines.neighbours import history_pairs, liked_pairs
from mtrec_jax.types import FIRST, PAD, Lists

if TYPE_CHECKING:
    import scipy.sparse as sp

_DEVICES = "device"  # mesh axis: the blocks of a group, one a device
_CELLS = 32  # C: a row's pairs are cut into pieces of so many
_PIECES = 256  # K of a block; more where one row has more
_ROWS = 128  # R of a block
_TINY = 1e-30  # of a sum of squares that is 0
_EXACT = 1e-12  # squared residual of a query, by that of zero


@dataclass(frozen=True, kw_only=True)
class Als:
    """`kind = "als"`: users and items as vectors whose products are high where users like items.

    Repeated interactions count once; padding and unknown ids are left out. A query is answered from
    its history alone: one system more, with the item vectors fixed. The systems of one side are
    divided over the process's devices, each of which holds all vectors.
    """

    kind: Literal["als"] = "als"
    factors: Annotated[int, Field(ge=1)] = 64
    epochs: Annotated[int, Field(ge=1)] = 15
    unobserved: Annotated[float, Field(gt=0)] = 0.3  # weight of every pair, liked or not
    regularization: Annotated[float, Field(gt=0)] = 0.003
    frequency: Annotated[float, Field(ge=0, le=1)] = 1.0  # 0: the same for frequent and rare rows
    steps: Annotated[int, Field(ge=1)] = 3  # of conjugate gradients, a row and epoch
    seed: Annotated[int, Field(ge=0)] = 0

    def fit(self, interactions: Interactions) -> Factors:
        """Solve for items and users in turn, users last.

        Raises:
          DataError: an id is beyond the users or items.
        """
        check_ids(self.kind, interactions)
        by_user = liked_pairs(interactions)
        by_item = by_user.T.tocsr()
        generator = np.random.default_rng(self.seed)
        users, items = (_drawn(generator, of, self.factors) for of in (by_user, by_item))
        user_blocks, item_blocks = (self._blocks(of) for of in (by_user, by_item))
        for _ in range(self.epochs):
            items = _solve(items, users, item_blocks, self.unobserved, self.steps, 0.0)
            users = _solve(users, items, user_blocks, self.unobserved, self.steps, 0.0)
        return Factors(np.asarray(users), np.asarray(items), self)

    def fold_in(
        self, items: Float32[np.ndarray, "rows d"], histories: Lists
    ) -> Float32[np.ndarray, "Q d"]:
        """The user vectors of histories, the item vectors fixed; zero where a history has none."""
        pairs = history_pairs(histories, len(items) - FIRST, np.asarray(items[FIRST:].any(axis=1)))
        start = _everywhere(np.zeros((len(histories) + FIRST, items.shape[1]), np.float32))
        blocks, most = self._blocks(pairs), 4 * items.shape[1]
        found = _solve(start, _everywhere(items), blocks, self.unobserved, most, _EXACT)
        return np.asarray(found)[FIRST:]

    def _blocks(self, pairs: sp.csr_array) -> list[_Block]:
        """The rows of one side, with what regularises them."""
        count = np.diff(pairs.indptr).astype(np.float64)
        weight = self.regularization * (count + self.unobserved * pairs.shape[1]) ** self.frequency
        return _packed(pairs, weight.astype(np.float32))


@dataclass(frozen=True)
class Factors:
    """Vectors by id; those of padding, unknown and untrained ids are zero."""

    users: np.ndarray  # [U + 2, d] float32
    items: np.ndarray  # [N + 2, d]
    options: Als

    def scorer(self, users: Int[np.ndarray, " Q"], histories: Lists) -> Products:
        """Score each query's history of item ids.

        Repeats count once; padding, unknown and untrained items are passed over.
        """
        return Products(self.options.fold_in(self.items, histories), self.items[FIRST:])

    def similar_items(
        self, items: Int[np.ndarray, " n"], k: int
    ) -> tuple[Float32[np.ndarray, "n k"], Int64[np.ndarray, "n k"]]:
        """The k items whose vectors are nearest to each item id's: (cosines, item ids)."""
        return _by_cosine("item", self.items[FIRST:], items, k)

    def similar_users(
        self, users: Int[np.ndarray, " n"], k: int
    ) -> tuple[Float32[np.ndarray, "n k"], Int64[np.ndarray, "n k"]]:
        """The k users whose vectors are nearest to each user id's: (cosines, user ids)."""
        return _by_cosine("user", self.users[FIRST:], users, k)


@dataclass(frozen=True)
class Products:
    """Products of the vectors of histories and items.

    >>> one = np.array([[1, 2]], np.float32)
    >>> Products(one, np.array([[1, 0], [0, 0.5]], np.float32)).scores(np.array([0, 0]))
    array([[1., 1.],
           [1., 1.]], dtype=float32)
    """

    queries: np.ndarray  # [Q, d] float32
    items: np.ndarray  # [N, d]

    def scores(self, queries: Int[np.ndarray, " q"]) -> Float32[np.ndarray, "q N"]:
        """Scores of the queries' histories; 0 of items that nobody likes in training."""
        return self.queries[queries] @ self.items.T


class _Block(NamedTuple):
    """Some rows of one side and their pairs, in pieces of C, for each of D devices."""

    members: jax.Array  # [D * K, C] int32 ids of the other side, 0 for none
    owner: jax.Array  # [D * K] int32: whose piece it is, as a place among the R rows, ascending
    ids: jax.Array  # [D * R] int32 ids of the rows, 0 for none
    weight: jax.Array  # [D * R] regularisation of the rows


def _mesh() -> Mesh:
    """The devices of this process."""
    return Mesh(np.asarray(jax.local_devices()), (_DEVICES,))


def _everywhere(array: Float32[np.ndarray, "n d"]) -> Float32[Array, "n d"]:
    """Whole on each device."""
    return jax.device_put(array, NamedSharding(_mesh(), P()))


def _packed(pairs: sp.csr_array, weight: Float32[np.ndarray, " n"]) -> list[_Block]:
    """Rows with pairs, one after the other, into blocks of K pieces and R rows; each is in one.
    As many blocks as there are devices go together."""
    count = np.diff(pairs.indptr).astype(np.int64)
    own = np.flatnonzero(count)
    pieces = -(-count[own] // _CELLS)
    room = 1 << (max(_PIECES, int(pieces.max(initial=1))) - 1).bit_length()
    block, begin, slot = (np.zeros(len(own), np.int64) for _ in range(3))
    number = filled = rows = 0
    for place, size in enumerate(pieces.tolist()):
        if filled + size > room or rows == _ROWS:
            number, filled, rows = number + 1, 0, 0
        block[place], begin[place], slot[place] = number, filled, rows
        filled, rows = filled + size, rows + 1
    devices = jax.local_device_count()
    blocks = -(-(number + 1) // devices) * devices if len(own) else 0
    first = block * room + begin  # piece of each row, counted over all blocks

    members = np.zeros((blocks, room, _CELLS), np.int32)
    places = np.repeat(first * _CELLS - pairs.indptr[own], count[own]) + np.arange(pairs.nnz)
    members.reshape(-1)[places] = pairs.indices + FIRST
    owner = np.full((blocks, room), _ROWS - 1, np.int32)
    within = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    owner.reshape(-1)[np.repeat(first, pieces) + within] = np.repeat(slot, pieces)
    ids, weights = np.full((blocks, _ROWS), PAD, np.int32), np.ones((blocks, _ROWS), np.float32)
    ids[block, slot], weights[block, slot] = own + FIRST, weight[own]
    split = NamedSharding(_mesh(), P(_DEVICES))
    parts = (
        part.reshape(blocks // devices, devices * part.shape[1], *part.shape[2:])
        for part in (members, owner, ids, weights)
    )
    groups = zip(*parts, strict=True)
    return [_Block(*(jax.device_put(part, split) for part in group)) for group in groups]


def _drawn(
    generator: np.random.Generator, pairs: sp.csr_array, factors: int
) -> Float32[Array, "n d"]:
    """Small random vectors by id, zero of rows without pairs."""
    size = (pairs.shape[0] + FIRST, factors)
    table = generator.normal(scale=0.1 / np.sqrt(factors), size=size).astype(np.float32)
    table[:FIRST] = 0
    table[FIRST:][np.diff(pairs.indptr) == 0] = 0
    return _everywhere(table)


def _solve(
    own: jax.Array,
    other: jax.Array,
    blocks: list[_Block],
    unobserved: float,
    steps: int,
    tolerance: float,
) -> Float32[Array, "n d"]:
    """All rows of one side `[n, d]` anew, those of the other side fixed; `own` is used up."""
    gram, mesh = _gram(other, unobserved), _mesh()
    whole = NamedSharding(mesh, P())
    for block in blocks:
        vectors, x = _rows(other, block.members), _rows(own, block.ids)
        given = x, vectors, block.owner, block.weight, gram, steps, tolerance
        own = _replaced(own, block.ids, _solved(*given, mesh=mesh), whole)
    return own.block_until_ready()


@jax.jit
def _gram(
    other: Float32[Array, "m d"], unobserved: Float32[Array, ""] | float
) -> Float32[Array, "d d"]:
    return unobserved * (other.T @ other)


@jax.jit
def _rows(table: Float32[Array, "m d"], ids: Int[Array, "*n"]) -> Float32[Array, "*n d"]:
    return table.at[ids].get(mode="promise_in_bounds")


@functools.partial(jax.jit, donate_argnames="table", static_argnames="whole")
def _replaced(
    table: Float32[Array, "m d"],
    ids: Int[Array, " r"],
    rows: Float32[Array, "r d"],
    whole: NamedSharding,
) -> Float32[Array, "m d"]:
    return jax.lax.with_sharding_constraint(table.at[ids].set(rows), whole)


_State = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


@functools.partial(jax.jit, static_argnames="mesh")
def _solved(
    x: Float32[Array, "Dr d"],
    vectors: Float32[Array, "Dk c d"],
    owner: Int[Array, " Dk"],
    weight: Float32[Array, " Dr"],
    gram: Float32[Array, "d d"],
    steps: Int[Array, ""] | int,
    tolerance: Float32[Array, ""] | float,
    mesh: Mesh,
) -> Float32[Array, "Dr d"]:
    """Each device's block by itself; nothing passes between them."""
    each, same = P(_DEVICES), P()
    given = (each, each, each, each, same, same, same)
    solve = jax.shard_map(_solved_block, mesh=mesh, in_specs=given, out_specs=each, check_vma=False)
    return solve(x, vectors, owner, weight, gram, jnp.asarray(steps), jnp.asarray(tolerance))


def _solved_block(
    x: Float32[Array, "r d"],
    vectors: Float32[Array, "k c d"],
    owner: Int[Array, " k"],
    weight: Float32[Array, " r"],
    gram: Float32[Array, "d d"],
    steps: Int[Array, ""],
    tolerance: Float32[Array, ""],
) -> Float32[Array, "r d"]:
    """Conjugate gradients for the rows of a block, beginning at x.

    A row stands still when its squared residual is below `tolerance` times the first one.
    Nothing of size d x d a row is made: the vectors are read twice a step, which on CPUs takes a
    third of the time of their products and a Cholesky factor. Shapes depend on K, C, R and d alone,
    so that users, items and queries share one program.
    """

    def added_up(pieces: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(pieces, owner, len(x), indices_are_sorted=True)

    def seen(x: jax.Array) -> jax.Array:
        return jnp.einsum("kcd,kd->kc", vectors, x[owner])

    def back(values: jax.Array) -> jax.Array:
        return added_up(jnp.einsum("kcd,kc->kd", vectors, values))

    def everywhere(x: jax.Array) -> jax.Array:
        return x @ gram + weight[:, None] * x

    def squared(x: jax.Array) -> jax.Array:
        return jnp.sum(x * x, axis=1)

    def step(state: _State) -> _State:
        number, x, rest, direction, size = state
        moved = back(seen(direction)) + everywhere(direction)
        length = size / jnp.maximum(jnp.sum(direction * moved, axis=1), _TINY)
        length = jnp.where(size > enough, length, 0.0)[:, None]
        x, rest = x + length * direction, rest - length * moved
        after = squared(rest)
        direction = rest + (after / jnp.maximum(size, _TINY))[:, None] * direction
        return number + 1, x, rest, direction, after

    def goes_on(state: _State) -> jax.Array:
        return (state[0] < steps) & jnp.any(state[-1] > enough)

    rest = back(1 - seen(x)) - everywhere(x)  # padding is 1 here, times a vector of zeros
    begin = squared(rest)
    enough = tolerance * begin
    return jax.lax.while_loop(goes_on, step, (jnp.int32(0), x, rest, rest, begin))[1]


def _by_cosine(
    what: str, vectors: Float32[np.ndarray, "n d"], ids: Int[np.ndarray, " m"], k: int
) -> tuple[Float32[np.ndarray, "m k"], Int64[np.ndarray, "m k"]]:
    """The nearest by cosine; rows of zeros are like nothing."""
    length = np.linalg.norm(vectors, axis=1)
    there = length > 0
    unit = vectors / np.where(there, length, 1)[:, None]

    def rows(which: np.ndarray) -> np.ndarray:
        both = there[which][:, None] & there[None]
        return np.where(both, unit[which] @ unit.T, np.float32(-np.inf))

    return most_similar(what, rows, ids, k, len(vectors))
