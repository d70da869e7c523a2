"""Rows of a sharded table to the devices that ask for them, and their gradients back to the owners.

A table is split by row over the mesh axis "table", and repeated over "data"; a batch is split over
both. Each device asks the owners of its distinct ids for their rows (`look_up`), and returns to
them the gradients (`update`), which are summed over all devices before the rule sees them. Buffers
have a fixed size. What does not fit waits for another round: no id is ever dropped, whatever the
skew, and nothing of the table's size is sent or made.

While it answers, an owner numbers the distinct rows that it is asked for, with a sparse set (Briggs
& Torczon 1993) over its scratch array: it needs no clearing. Gradients come back under these
numbers, and are added up in a buffer for one window of numbers after the other.

Rows should be spread evenly over the shards (`layout.spread`): skew takes more rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Num

from mtrec_jax.types import PyTree

_BOTH = ("data", "table")
_MULTIPLIERS = (0x9E3779B1, 0x85EBCA77)  # of two hash functions


class Buffers(NamedTuple):
    """Static sizes: what goes through the network at once."""

    places: int  # ids that a device sends to each owner in a round
    window: int  # rows that an owner updates at once


BuffersOf = dict[str, Buffers]  # {stack: sizes}


class Asked(NamedTuple):
    """What a lookup knows that the way back needs; split over devices like ids and tables."""

    leader: Int[Array, " n"]  # position of the id that is sent for this one, of the same device
    owner: Int[Array, " n"]  # shard of the row; the number of shards where nothing is sent
    number: Int[Array, " n"]  # the row's number at its owner
    rows: Int[Array, " m"]  # the owner's rows by number
    numbers: Int[Array, " S"]  # how many the owner has given
    rounds: Int[Array, " S"]


def default_buffers(ids: int, mesh: Mesh | AbstractMesh) -> Buffers:
    """Buffers for a number of ids in all, most of them distinct and evenly spread.

    >>> from mtrec_jax.sharding import make_mesh
    >>> default_buffers(1000, make_mesh((1, 1)))
    Buffers(places=1250, window=1250)
    """
    shards = mesh.shape["table"]
    return Buffers(
        max(1, -(-5 * ids // (4 * mesh.size * shards))), max(1, -(-5 * ids // (4 * shards)))
    )


def demand(
    ids: Int[Array, " n"], rows: int, mesh: Mesh | AbstractMesh
) -> Int[Array, "devices shards"]:
    """How many ids each device sends to each owner in a `look_up`; places for all take one round.

    Args:
      ids: as `look_up` takes them.
      rows: V of the table.
      mesh: with the axes "data" and "table"; its devices need not be there.
    """
    shards = mesh.shape["table"]

    def of_device(part: Array) -> Array:
        _, owner, _ = _route(part, rows // shards, shards)
        return jnp.zeros(shards, jnp.int32).at[owner].add(1, **_DROP)

    return jax.vmap(of_device)(ids.reshape(mesh.size, -1))


def look_up(
    table: Num[Array, "V D"],
    scratch: Int[Array, " V"],
    ids: Int[Array, " n"],
    mesh: Mesh,
    buffers: Buffers,
) -> tuple[Num[Array, "n D"], Int[Array, " V"], Asked]:
    """Rows of ids, zero where an id is below 0; in `jax.jit`.

    Args:
      table: split by row over "table".
      scratch: work space, whatever is in it; replaced.
      ids: rows of the table; n is a multiple of the number of devices.
      mesh: with the axes "data" and "table".
      buffers: sizes, which change nothing of the result.
    """
    shards = mesh.shape["table"]
    most = min(table.shape[0] // shards, len(ids))

    def local(shard: Array, scratch: Array, ids: Array) -> tuple[Array, Array, Asked]:
        leader, owner, row = _route(ids, shard.shape[0], shards)
        rank, rounds = _ranks(owner, shards, buffers.places)

        def ask(number: Array, state: Any) -> Any:
            found, numbers, scratch, known = state
            place, sent = _places(rank, owner, number, buffers.places, shards)
            wanted = _exchanged(
                jnp.full((shards, buffers.places), -1, jnp.int32).at[place].set(row, **_DROP)
            )
            # All replicas of a shard number the requests of all, in the same order.
            every = lax.all_gather(wanted, "data").reshape(-1)
            scratch, known = _numbered(every, scratch, known)
            given = jnp.where(wanted >= 0, scratch[jnp.maximum(wanted, 0)], jnp.int32(-1))
            answer = jnp.where((wanted >= 0)[..., None], shard[jnp.maximum(wanted, 0)], 0)
            answer, given = _exchanged(answer), _exchanged(given)
            found = jnp.where(sent[:, None], answer.at[place].get(mode="clip"), found)
            numbers = jnp.where(sent, given.at[place].get(mode="clip"), numbers)
            return found, numbers, scratch, known

        start = (
            jnp.zeros((len(ids), shard.shape[1]), shard.dtype),
            jnp.full(len(ids), -1, jnp.int32),
            scratch,
            (jnp.zeros(most, jnp.int32), jnp.int32(0)),
        )
        found, numbers, scratch, (rows, count) = lax.fori_loop(jnp.int32(0), rounds, ask, start)
        found = jnp.where((ids >= 0)[:, None], found[leader], 0)
        return found, scratch, Asked(leader, owner, numbers, rows, count[None], rounds[None])

    each, shard = P(_BOTH), P("table")
    asked = Asked(each, each, each, shard, shard, shard)  # type: ignore[arg-type]
    return _sharded(local, mesh, (shard, shard, each), (each, shard, asked))(table, scratch, ids)


def update(
    apply: Callable[..., tuple[Array, PyTree]],
    table: Num[Array, "V D"],
    slots: PyTree,
    asked: Asked,
    grads: Float[Array, "n D"],
    mesh: Mesh,
    buffers: Buffers,
) -> tuple[Num[Array, "V D"], PyTree]:
    """Sum the gradients of equal ids over all devices, and update each touched row once.

    Args:
      apply: (table, slots, addresses [m], grads [m, D]) -> (table, slots), of different rows.
      table: split over "table", as the slots.
      slots: a pytree of arrays with a row for each of the table.
      asked: from `look_up` of the same ids.
      grads: of the rows that it returned.
      mesh, buffers: as there; sizes change the order of additions only.
    """
    shards, (places, window) = mesh.shape["table"], buffers

    def local(shard: Array, slots: PyTree, asked: Asked, grads: Array) -> tuple[Array, PyTree]:
        summed = jnp.zeros(grads.shape, jnp.promote_types(grads.dtype, jnp.float32))
        summed = summed.at[asked.leader].add(grads)
        count = asked.numbers[0]
        rows = jnp.pad(asked.rows, (0, window))

        def one_window(number: Array, state: Any) -> Any:
            shard, slots = state
            first = number * window
            inside = (asked.number >= first) & (asked.number < first + window)
            owner = jnp.where(inside, asked.owner, shards)
            rank, rounds = _ranks(owner, shards, places)

            def send(round_: Array, total: Array) -> Array:
                place, _ = _places(rank, owner, round_, places, shards)
                target = jnp.full((shards, places), window, jnp.int32)
                target = _exchanged(target.at[place].set(asked.number - first, **_DROP))
                part = jnp.zeros((shards, places, grads.shape[1]), summed.dtype)
                part = _exchanged(part.at[place].set(summed, **_DROP))
                return total.at[target.reshape(-1)].add(
                    part.reshape(-1, part.shape[-1]), mode="drop"
                )

            total = lax.fori_loop(
                0, rounds, send, jnp.zeros((window, grads.shape[1]), summed.dtype)
            )
            total = lax.psum(total, "data")
            here = jnp.arange(window, dtype=jnp.int32)
            target = lax.dynamic_slice_in_dim(rows, first, window)
            target = jnp.where(first + here < count, target, shard.shape[0] + here)
            return apply(shard, slots, target, total)

        windows = lax.pmax(-(-count // window), _BOTH)
        return lax.fori_loop(jnp.int32(0), windows, one_window, (shard, slots))

    each, shard = P(_BOTH), P("table")
    asked_spec = Asked(each, each, each, shard, shard, shard)  # type: ignore[arg-type]
    program = _sharded(local, mesh, (shard, shard, asked_spec, each), (shard, shard))
    return program(table, slots, asked, grads)


def rounds(asked: Asked, buffers: Buffers) -> Int[Array, ""]:
    """How often the slowest exchange of a step went through the network; 1 if buffers suffice."""
    windows = -(-asked.numbers // buffers.window)
    return jnp.maximum(jnp.max(asked.rounds), jnp.max(windows)).astype(jnp.int32)


# --- Inside `jax.shard_map`

_DROP: dict[str, Any] = {"mode": "drop"}


def _sharded(
    local: Callable[..., Any], mesh: Mesh, inputs: Any, outputs: Any
) -> Callable[..., Any]:
    return jax.shard_map(local, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


def _exchanged(array: Array) -> Array:
    """Part s of the first axis to shard s, and from there what it has for this device."""
    return lax.all_to_all(array, "table", 0, 0, tiled=True)


def _route(ids: Array, size: int, shards: int) -> tuple[Array, Array, Array]:
    """A leader for each id, and for the leaders their owner and the row in its shard.

    Equal ids have one leader but for collisions in both hash functions, which cost a place in the
    buffers and nothing else.
    """
    position = jnp.arange(len(ids), dtype=jnp.int32)
    bits = max(1, (2 * len(ids) - 1).bit_length())
    leader, is_open = position, ids >= 0
    for multiplier in _MULTIPLIERS:
        slot = (ids.astype(jnp.uint32) * jnp.uint32(multiplier)) >> jnp.uint32(32 - bits)
        slot = slot.astype(jnp.int32)
        seats = jnp.zeros(1 << bits, jnp.int32)
        seats = seats.at[jnp.where(is_open, slot, 1 << bits)].set(position, **_DROP)
        same = is_open & (ids[seats[slot]] == ids)
        leader, is_open = jnp.where(same, seats[slot], leader), is_open & ~same
    leads = (ids >= 0) & (leader == position)
    return leader, jnp.where(leads, ids // size, jnp.int32(shards)), ids % size


def _ranks(owner: Array, shards: int, places: int) -> tuple[Array, Array]:
    """Each id's place among those of its owner, and the rounds in which all devices are through."""
    goes = owner[:, None] == jnp.arange(shards, dtype=jnp.int32)[None, :]
    before = jnp.cumsum(goes, axis=0, dtype=jnp.int32)
    rank = jnp.take_along_axis(before, jnp.minimum(owner, shards - 1)[:, None], axis=1)[:, 0] - 1
    most = jnp.max(before[-1]) if len(owner) else jnp.int32(0)
    return rank, lax.pmax(-(-most // places), _BOTH)


def _places(
    rank: Array, owner: Array, number: Array, places: int, shards: int
) -> tuple[tuple[Array, Array], Array]:
    """Where ids stand in this round's [shards, places] buffer, and which are in it."""
    place = rank - number * places
    sent = (owner < shards) & (place >= 0) & (place < places)
    return (jnp.where(sent, owner, shards), jnp.where(sent, place, 0)), sent


def _numbered(
    wanted: Array, scratch: Array, known: tuple[Array, Array]
) -> tuple[Array, tuple[Array, Array]]:
    """Give a number to each row that has none yet; scratch[row] is its number from then on.

    What stands in `scratch` means something only where `rows` confirms it.
    """
    rows, count = known
    position = jnp.arange(len(wanted), dtype=jnp.int32)
    row = jnp.maximum(wanted, 0)
    number = scratch[row]
    has_one = (number >= 0) & (number < count) & (rows.at[number].get(mode="clip") == row)
    is_new = (wanted >= 0) & ~has_one
    outside = len(scratch)
    # The first of equal rows wins, and not the last that is written: all replicas of a shard have
    # to agree, and the order of writes to one place is nowhere promised.
    target = jnp.where(is_new, row, outside)
    scratch = scratch.at[target].set(jnp.iinfo(jnp.int32).max, **_DROP)
    scratch = scratch.at[target].min(position, **_DROP)
    wins = is_new & (scratch[row] == position)
    given = count + jnp.cumsum(wins, dtype=jnp.int32) - 1
    rows = rows.at[jnp.where(wins, given, len(rows))].set(row, **_DROP)
    scratch = scratch.at[jnp.where(wins, row, outside)].set(given, **_DROP)
    return scratch, (rows, count + jnp.sum(wins, dtype=jnp.int32))
