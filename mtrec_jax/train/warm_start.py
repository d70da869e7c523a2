"""A new run that begins with what another run has learned: its parameters and tables.

Rows are carried over table by table: a vocabulary value keeps its row wherever that row lies now,
and a value that the other run did not know keeps its initial one. Optimizer state, step, schedule,
random numbers and the position in the data start afresh.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mtrec_jax import processes
from mtrec_jax.arguments import a_path, argument
from mtrec_jax.data.dataset import SPLITS, Manifest, NumberField, Prepared
from mtrec_jax.data.features import one_array
from mtrec_jax.errors import ConfigError
from mtrec_jax.models.inputs import ITEM, Inputs, make_inputs, shared_name, side_group
from mtrec_jax.tables.layout import DENSE, Place, as_held, as_numbers, spread
from mtrec_jax.train.records import read_json, write_json
from mtrec_jax.train.run import Run, has_checkpoint, load_best, open_run
from mtrec_jax.types import FIRST, UNKNOWN, PyTree, TrainState

NOTES = "init_from.json"  # in the run folder
_HELD = SPLITS[1:]
_ROWS_AT_ONCE = 1 << 18  # that are in flight between two tables


class _Match(NamedTuple):
    """Which rows of an owner are carried over, as local ids there and here."""

    of: np.ndarray
    to: np.ndarray
    carried: int  # values that keep their row
    fresh: int  # values that have their initial one
    same: bool  # the two vocabularies are one


def find_source(init_from: str | Path | Run | None, run: Run) -> Run | None:
    """The run whose model `run` begins with, opened; None where it begins with none, or has begun.

    Args:
      init_from: a run folder, or an opened run (where its prepared data has moved).
      run: the new run; its folder may not exist yet.

    Raises:
      ConfigError: the folder holds a run that has begun otherwise, or the two are the same.
      CheckpointError, DataError: there is no run, or its prepared data is gone.
    """
    wanted = init_from.folder if isinstance(init_from, Run) else init_from
    wanted = None if wanted is None else a_path("init_from", wanted).resolve()
    path = run.folder / NOTES
    if wanted == run.folder.resolve():
        raise ConfigError(
            f"{argument('init_from')} names {run.folder} itself; pass another {argument('run')}"
        )
    if has_checkpoint(run.folder):
        begun = Path(read_json(path)["run"]) if path.exists() else None
        if wanted is not None and wanted != begun:
            what = f"was initialised from {begun}" if begun else "was initialised at random"
            raise ConfigError(
                f"{run.folder} {what}, not from {wanted}, and has begun already. Continue it "
                f"without {argument('init_from')}, or pass another {argument('run')}"
            )
        return None
    if processes.is_first():
        path.unlink(missing_ok=True)  # of a start that failed before its first checkpoint
    if wanted is None:
        return None
    if isinstance(init_from, Run):
        own, learned = init_from.prepared, init_from.prepared.learned
        if learned:  # opened on newer data: what it was trained on counts
            init_from = open_run(init_from.folder, learned, own.extensions)
        return _split_alike(init_from, run)
    notes = read_json(wanted / "prepared.json") if (wanted / "prepared.json").exists() else {}
    same = notes.get("fingerprint") == run.prepared.manifest.fingerprint
    return _split_alike(open_run(wanted, run.prepared.folder if same else None), run)


def _split_alike(source: Run, run: Run) -> Run:
    """The source, unless it may have trained on what the new run holds back."""
    old, new = source.prepared.manifest, run.prepared.manifest
    if run.experiment.split.whole:
        return source  # nothing is held back
    there, here = (m.config.get("split") for m in (old, new))
    if there != here:
        raise ConfigError(
            f"{argument('init_from')} {source.folder} was split by {there}, the new run by {here}: "
            "it may have trained on what is now held back. Prepare with the same [split]"
        )
    if why := "" if old.fingerprint == new.fingerprint else _leak(old, new):
        raise ConfigError(
            f"{argument('init_from')} {source.folder} may have trained on what is held back "
            f"here: {why}, or train without {argument('init_from')}"
        )
    return source


def _leak(old: Manifest, new: Manifest) -> str:
    """Why events that trained in one folder may be held back in another of the same [split]."""
    kind, known = new.split.kind, len(old.event_files)
    if kind in ("random", "folds", "files"):
        if known and new.event_files[:known] == old.event_files:
            return ""
        return (
            f"split.kind = '{kind}' goes by the numbers of rows, and the files of events there "
            "are not the first ones here. Put new rows into files of their own, whose names sort "
            "behind the old ones, and prepare both anew, or split by time or by users"
        )
    times, earlier = new.split.times, old.split.times
    held = min((times[name][0] for name in _HELD if name in times), default=None)
    if kind == "time" and held is not None and "train" in earlier and earlier["train"][1] >= held:
        return (
            f"events until {_shown(earlier['train'][1])} trained there, those from {_shown(held)} "
            "on are held back here. Prepare a log that goes on after the other"
        )
    if kind in ("leave_one_out", "user_ratio") and times and earlier:
        last, before = (max(span[1] for span in t.values()) for t in (times, earlier))
        if last < before:
            return (
                f"the log there goes on until {_shown(before)}, here it ends at {_shown(last)}. "
                "Prepare the longer log"
            )
    return ""


def _shown(seconds: float) -> str:
    return str(np.datetime64(int(seconds), "s")).replace("T", " ")


def warm_start(
    state: TrainState,
    run: Run,
    source: Run,
    mesh: jax.sharding.Mesh,
    note: Callable[[str], None],
) -> TrainState:
    """The state with the parameters and tables of another run's best checkpoint.

    Args:
      state: a fresh one, which is donated; its shapes and shardings stay.
      run: the run that begins; what it was initialised from is written to its folder.
      source: the run that is taken over.
      mesh: the devices of the state.
      note: called with one line that says what was taken over.

    Raises:
      ConfigError: a dense parameter has another shape there, or means something else.
      CheckpointError: the other run has no usable checkpoint.
    """
    params, tables, step = load_best(source, mesh)
    network = _same_shapes(state.params["network"], params["network"], source)
    old, new = ({**t, **_dense(p)} for t, p in ((tables, params), (state.tables, state.params)))
    plans = [make_inputs(r.experiment, r.prepared.manifest) for r in (source, run)]
    _same_meaning(plans, source, run)
    there, here = (plan.layout.places for plan in plans)
    matches = {
        name: _rows_of(_match(shared_name(name), source, run), there.get(name), place)
        for name, place in here.items()
    }
    if plans[0].layout == plans[1].layout and all(match.same for match in matches.values()):
        taken = {stack: _placed(old[stack], new[stack]) for stack in new}
    else:
        taken = _carry(old, new, plans, matches)
    carried = {owner: match.carried for owner, match in matches.items()}
    fresh = {owner: match.fresh for owner, match in matches.items()}
    line = (
        f"initialised from {source.folder} (step {step}): {len(jax.tree.leaves(network))} dense "
        f"parameters and {len(matches)} tables, {sum(carried.values()):,} rows carried over, "
        f"{sum(fresh.values()):,} new"
    )
    if nothing := [owner for owner in carried if fresh[owner] and not carried[owner]]:
        line += f" (all of {', '.join(nothing)})"
    notes = {"run": str(source.folder.resolve()), "step": step}
    notes |= {"fingerprint": source.prepared.manifest.fingerprint, "carried": carried, "new": fresh}
    if processes.is_first():
        write_json(run.folder / NOTES, notes)
    note(line)
    new_params = {**_dense(taken), "network": network}
    tables = {stack: table for stack, table in taken.items() if stack != DENSE}
    return state._replace(params=new_params, tables=tables)


def _dense(stacks: PyTree) -> dict[str, jax.Array]:
    return {DENSE: stacks[DENSE]} if DENSE in stacks else {}


def _placed(array: jax.Array, like: jax.Array) -> jax.Array:
    return jax.device_put(as_held(as_numbers(array), like.dtype), like.sharding)


def _same_shapes(new: PyTree, old: PyTree, source: Run) -> PyTree:
    """The old dense parameters in the places of the new ones."""
    theirs, ours = (
        {jax.tree_util.keystr(path): x.shape for path, x in jax.tree.leaves_with_path(tree)}
        for tree in (old, new)
    )
    for name in sorted(theirs.keys() | ours.keys()):
        shapes = [list(x[name]) if name in x else "missing" for x in (theirs, ours)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"parameter network{name} is {shapes[0]} in {source.folder} and {shapes[1]} here: "
                "[model], the tasks, their classes and what the features are have to be those of "
                f"{source.folder / 'config.toml'}. Set them alike (prepare new data with "
                f"{argument('grow_from')} {source.prepared.folder}), or train without "
                f"{argument('init_from')}"
            )
    return jax.tree.map(_placed, old, new)


def _same_meaning(plans: Sequence[Inputs], source: Run, run: Run) -> None:
    """Equal shapes could still mean others: tasks or inputs that have changed places or names."""
    there, here = (
        {
            "tasks": list(plan.order),
            "classes": [
                f"{t} {c}" for t, of in r.prepared.manifest.tasks.items() for c in of.classes
            ],
            "inputs of a user": _inputs(plan, "context", r.prepared.manifest.context_numbers),
            "inputs of a moment": _inputs(plan, "request", r.prepared.manifest.request_numbers),
            "inputs of an item": _inputs(plan, "item", r.prepared.manifest.item_numbers),
            "inputs of an event": _inputs(plan, "history", ()),
            "inputs of the bias": list(r.experiment.model.bias.features)
            if r.experiment.model.bias
            else [],
        }
        for plan, r in zip(plans, (source, run), strict=True)
    )
    for what in here:
        if there[what] != here[what]:
            raise ConfigError(
                f"the {what} are {', '.join(there[what])} in {source.folder} and "
                f"{', '.join(here[what])} here: name them alike, in the same order, or train "
                f"without {argument('init_from')}"
            )


def _inputs(plan: Inputs, side: str, numbers: Sequence[NumberField]) -> list[str]:
    group = plan.layout.groups.get(side_group(side), ())
    return [slots.place.name for slots in group] + [f.name for f in numbers]


def _match(owner: str, source: Run, run: Run) -> _Match:
    """Which local ids of an owner stand for the same values in the other run."""
    ours, theirs = (_values(r.prepared, owner) for r in (run, source))
    values, others = (_size(r.prepared, owner) for r in (run, source))
    nothing = np.zeros(0, np.int64)
    if (ours is None) != (theirs is None):
        return _Match(nothing, nothing, 0, values, False)
    if ours is None or theirs is None:  # the ids are hashes, the same ones where they are as many
        every = np.arange(UNKNOWN, FIRST + values)
        if values != others:
            return _Match(nothing, nothing, 0, values, False)
        return _Match(every, every, values, 0, True)
    found = pc.index_in(ours, value_set=theirs)
    known = found.is_valid().to_numpy(zero_copy_only=False)
    places = pc.fill_null(found, 0).to_numpy(zero_copy_only=False)[known].astype(np.int64)
    of = np.concatenate([[UNKNOWN], places + FIRST])
    to = np.concatenate([[UNKNOWN], np.flatnonzero(known) + FIRST])
    carried = len(places)
    same = carried == values == others and bool((of == to).all())
    return _Match(of, to, carried, values - carried, same)


def _rows_of(match: _Match, there: Place | None, here: Place) -> _Match:
    """The rows of these ids. Rows that hashed ids share are carried over if no id has changed."""
    nothing = match.of[:0]
    none = _Match(nothing, nothing, 0, match.carried + match.fresh, False)
    if there is None or there.functions != here.functions:
        return none
    if not here.functions:
        return match
    if there.size != here.size or not match.carried or (match.of != match.to).any():
        return none
    every = np.arange(UNKNOWN, here.size)
    return match._replace(of=every, to=every)


def _size(prepared: Prepared, name: str) -> int:
    """Values that a table's ids stand for."""
    m = prepared.manifest
    if name == ITEM:
        return m.item_values or m.trained_items
    fields = (*m.context_ids, *m.request_ids, *m.item_ids, *m.history)
    return next((f.size - FIRST for f in fields if f.name == name), 0)


def _values(prepared: Prepared, owner: str) -> pa.Array | None:
    """Raw value of each local id from `FIRST` on; None where ids are hashes of the values."""
    if owner == ITEM:
        return one_array(prepared.item_vocabulary)
    if not (prepared.folder / "vocabularies" / f"{owner}.parquet").is_file():
        return None
    return one_array(prepared.vocabulary(owner)["value"])


def _carry(
    old: dict[str, jax.Array],
    new: dict[str, jax.Array],
    plans: Sequence[Inputs],
    matches: dict[str, _Match],
) -> dict[str, jax.Array]:
    """The new stacks with the rows of the old ones; the new ones are donated."""
    moves: dict[tuple[str, str], list[np.ndarray]] = {}
    for owner, match in matches.items():
        if len(match.to):
            there, here = (plan.layout.places[owner] for plan in plans)
            numbers = np.stack([match.of + there.offset, match.to + here.offset])
            moves.setdefault((there.stack, here.stack), []).append(numbers)
    new = dict(new)
    for (of_stack, to_stack), parts in moves.items():
        numbers = np.concatenate(parts, axis=1)
        move = _mover(old[of_stack], new[to_stack], of_stack != DENSE, to_stack != DENSE)
        size = min(_ROWS_AT_ONCE, numbers.shape[1])
        for start in range(0, numbers.shape[1], size):
            part = numbers[:, start : start + size]
            part = np.pad(part, ((0, 0), (0, size - part.shape[1])), constant_values=-1)
            new[to_stack] = move(new[to_stack], old[of_stack], *part.astype(np.int32))
    return new


def _mover(old: jax.Array, new: jax.Array, spread_old: bool, spread_new: bool) -> Any:
    """A compiled function that sets the rows of some numbers to those of others, -1 to none."""

    def move(new: jax.Array, old: jax.Array, of: jax.Array, to: jax.Array) -> jax.Array:
        of = spread(of, old.shape[0]) if spread_old else of
        to = spread(to, new.shape[0]) if spread_new else to
        to = jnp.where(to < 0, new.shape[0], to)  # dropped
        rows = as_held(as_numbers(old.at[of].get(mode="clip")), new.dtype)
        return new.at[to].set(rows, mode="drop")

    return jax.jit(move, donate_argnums=0, out_shardings=new.sharding)
