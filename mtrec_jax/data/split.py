"""Which events train, which choose, which judge: Ibis expressions in integer arithmetic.

No engine's random numbers or hashes are used: the same rows fall into the same splits everywhere.
"""

from __future__ import annotations

import functools
import hashlib
import operator
from typing import Any

import ibis

from mtrec_jax.config import Experiment, Split
from mtrec_jax.data.dataset import SHOWN, SPLITS, SplitInfo
from mtrec_jax.data.engine import rows
from mtrec_jax.data.examples import MODULUS, mix

MILLION = 10**6  # shares of a user's events are counted in millionths


def split_events(events: Any, experiment: Experiment) -> Any:
    """Events with their `split` in the place of their `part`.

    Args:
      events: Ibis table with row, part (0 events, 1 test files, 2 validation files) and, by kind,
        user, item and time.
      experiment: its `split` says how.

    Returns:
      0 train, 1 validation, 2 test, or 3: an event of a held-out user that is shown in histories,
      and neither trains nor judges. With validation = 0 and test = 0 every event trains.
    """
    split = experiment.split
    shown = ibis.literal(False)
    if split.whole:
        return events.mutate(split=ibis.literal(0, "int8")).drop("part")
    if split.kind in ("leave_one_out", "user_ratio", "user_holdout"):
        by_user = ibis.window(group_by="user", order_by=in_order(events))
        whole = ibis.window(group_by="user")
        events = events.mutate(nth=ibis.row_number().over(by_user), n=events.count().over(whole))
    if split.kind == "leave_one_out":
        test, validation = ((events.n >= 3) & (events.nth == events.n - k) for k in (1, 2))
    elif split.kind == "time":
        shares = (1 - split.validation - split.test, 1 - split.test)
        validation, test = (_since(events.time, border) for border in _borders(events, shares))
    elif split.kind == "user_ratio":
        held = ibis.least(_part(events.n, split.validation + split.test), events.n - 1)
        validation = events.nth >= events.n - held
        test = validation & (events.nth >= events.n - _part(events.n, split.test))
    elif split.kind == "folds":
        events, test, validation = _folds(events, split)
    elif split.kind == "files":
        test, by_chance = events.part == 1, mix(events.row, split.seed)
        validation = by_chance < round(split.validation * MODULUS)
        validation = events.part == 2 if split.validation_files else validation
    else:  # by chance: events, users or items
        if split.kind == "random":
            chance = mix(events.row, split.seed)
        else:
            events = _with_chance(events, split)
            chance = events.chance
        test = chance < round(split.test * MODULUS)
        validation = chance < round((split.test + split.validation) * MODULUS)
        if split.kind == "user_holdout":  # who has one event has nothing to be judged by
            first = ibis.greatest(_part(events.n, split.fold_in, 0), 1)
            shown = validation & (events.nth < ibis.least(first, ibis.greatest(events.n - 1, 1)))
    chosen = ibis.cases((shown, SHOWN), (test, 2), (validation, 1), else_=0).cast("int8")
    helpers = {"part", "nth", "n", "chance"}.intersection(events.columns)
    return events.mutate(split=chosen).drop(*helpers)


def in_order(events: Any) -> list[str]:
    """The columns by which events are in order: time, if there is one, and place in the source."""
    return [name for name in ("time", "row") if name in events.columns]


def describe_split(events: Any, experiment: Experiment) -> SplitInfo:
    """Sizes, times and fingerprint of events with `row`, `split` and, if there is one, `time`, in
    any order and on any engine.

    The fingerprint is made of sums over mixed numbers below 2^31, which stay below 2^63.
    """
    pair = events.row * 4 + events["split"].cast("int64")
    time = events["time"] if "time" in events.columns else ibis.null("float64")
    found = rows(
        events.select("split", a=mix(pair, 1), b=mix(pair, 2), time=time)
        .group_by("split")
        .agg(
            lambda t: t.count().name("n"),
            a=lambda t: t.a.sum(),
            b=lambda t: t.b.sum(),
            first=lambda t: t.time.min(),
            last=lambda t: t.time.max(),
        )
    )
    names = dict(zip((*SPLITS, "shown"), (0, 1, 2, SHOWN), strict=True))
    by_code = {
        r["split"]: (float(r["first"]), float(r["last"])) for r in found if r["first"] is not None
    }
    sizes = {n: sum(int(r["n"]) for r in found if r["split"] == code) for n, code in names.items()}
    sums = [sum(int(r[name]) for r in found) for name in ("n", "a", "b")]
    return SplitInfo(
        kind=experiment.split.kind,
        seed=experiment.split.seed,
        sizes={name: size for name, size in sizes.items() if size or name in SPLITS},
        fingerprint=hashlib.sha256(" ".join(map(str, sums)).encode()).hexdigest()[:16],
        times={name: by_code[code] for name, code in names.items() if code in by_code},
    )


def _with_chance(events: Any, split: Split) -> Any:
    """Events with the `chance` of their user or item, a number below 2^31.

    It is mixed from 28 bits of the MD5 of the raw id, so that it does not depend on other ids.
    """
    key = "item" if split.kind == "cold_item" else "user"
    ids = events.select(key).distinct()
    digest, code = ids[key].hexdigest("md5"), ibis.literal(0, "int64")
    for place in range(7):
        digit = ibis.literal("0123456789abcdef").find(digest.substr(place, 1))
        code = code * 16 + digit.cast("int64")
    # an aggregate, because engines would copy the code into each of the many places in `mix`
    codes = ids.group_by(key).agg(code=code.max())
    chances = codes.select(key, chance=mix(codes.code, split.seed))
    return events.inner_join(chances, key)


def _part(count: Any, share: float, half: int = MILLION // 2) -> Any:
    """`share` of a count, rounded; downwards where `half` is 0."""
    return (count * round(share * MILLION) + half) // MILLION


def _folds(events: Any, split: Split) -> tuple[Any, Any, Any]:
    """The events that fold `split.fold` is about, and which of them test and validate.

    Folds of time are k + 2 windows with equally many events. The first `fold` + 1 of them train,
    the next validates, the one after it tests, and what comes later is no part of the log: as if
    the log ended there. With `hold_back` this share of what comes before the test window validates.
    """
    if split.by == "time":
        windows, share = split.folds + 2, split.hold_back
        until = (split.fold + 2) / windows
        since = (split.fold + 1) / windows if share is None else until * (1 - share)
        validation, test, later = _borders(events, (since, until, (split.fold + 3) / windows))
        events = events.filter(~_since(events.time, later))
        return events, _since(events.time, test), _since(events.time, validation)
    if split.by == "user":
        events = _with_chance(events, split)
        chance = events.chance
    elif split.stratify:
        # places in a random order of the label's own rows: each fold has its share, but for one row
        events = events.mutate(chance=mix(events.row, split.seed))
        alike = ibis.window(group_by=f"label_{split.stratify}", order_by=["chance", "row"])
        events = events.mutate(chance=ibis.row_number().over(alike).cast("int64"))
        chance = events.chance
    else:
        chance = mix(events.row, split.seed)
    test = chance % split.folds == split.fold
    if split.hold_back is None:
        return events, test, chance % split.folds == (split.fold + 1) % split.folds
    held = mix(chance, split.seed + 1) < round(split.hold_back * MODULUS)
    return events, test, held & ~test


def _borders(events: Any, shares: tuple[float, ...]) -> list[float | None]:
    """The first timestamps behind shares of the events: as close to these as ties allow."""
    times = events.group_by("time").agg(n=lambda t: t.count())
    until = ibis.window(order_by="time", preceding=None, following=0)
    times = times.mutate(
        before=times.n.sum().over(until) - times.n, total=times.n.sum().over(ibis.window())
    )
    away = [(times.before - share * times.total.cast("float64")).abs() for share in shares]
    times = times.mutate(**{f"away_{i}": distance for i, distance in enumerate(away)})
    least = [times[f"away_{i}"].min().over(ibis.window()) for i in range(len(shares))]
    near = [times[f"away_{i}"] == distance for i, distance in enumerate(least)]
    times = times.mutate(**{f"near_{i}": is_near for i, is_near in enumerate(near)})
    found = rows(
        times.filter(
            functools.reduce(operator.or_, (times[f"near_{i}"] for i in range(len(shares))))
        )
    )
    borders: list[float | None] = []
    for i, share in enumerate(shares):
        nearest = min((r for r in found if r[f"near_{i}"]), key=lambda r: r["time"], default=None)
        if nearest:  # the end of the log is a border as well
            total = int(nearest["total"])
            inside = nearest[f"away_{i}"] <= abs(total - share * total)
        borders.append(nearest["time"] if nearest and inside else None)
    return borders


def _since(time: Any, border: float | None) -> Any:
    return ibis.literal(False) if border is None else time >= border
