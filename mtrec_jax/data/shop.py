"""A generated shop log with planted tastes, so that the best possible score is known.

Every user has one of six hidden types. What a user clicks, buys and how the purchase is rated
depend on the pair (type, category), on the item's hidden style and on how the price suits the
user's segment:

    click logit = c0 + activity[user] + appeal[item] + click[type, category] + style[type, style]
                  + slope[segment] * price
    buy logit   = b0 + buy[type, category] + quality[brand] + slope[segment] * price  after a click
    stars       = round(s0 + stars[type, category] + quality[brand] + noise)          after a buy

The three taste tables are +-1 patterns that sum to zero over types and over categories, so that a
model without interactions sees little of them, whereas a model that infers the type from the
user's past sees nearly all. No feature names the type; the age group only leans towards it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
from jaxtyping import Float, Num, Shaped
from scipy import special, stats

from mtrec_jax.data import shop_requests, shop_social
from mtrec_jax.errors import ConfigError

FILES = ("events.csv", "items.csv", "users.csv", "truth.json")
CATEGORIES = ("books", "garden", "kitchen", "music", "sport", "tools", "toys", "travel")
BRANDS = ("Alder", "Birch", "Cedar", "Elm", "Fir", "Hazel", "Larch", "Maple", "Oak", "Rowan")
SEGMENTS = ("budget", "regular", "premium")
SHOPS: dict[str, dict[str, bool]] = {  # {name: what is planted on top}
    "shop": {},
    "shop-social": {"social": True},
    "shop-requests": {"requests": True},
}
AGES = ("16-24", "25-34", "35-44", "45-54", "55-64", "65+")
TYPES = 6
USERS, ITEMS, IMPRESSIONS = 2800, 360, 72  # IMPRESSIONS is the mean of a user

_VERSION = 2  # raised with every change of what a seed generates
_CLICK_TASTE, _STYLE_TASTE, _BUY_TASTE, _STARS_TASTE = 1.5, 0.1, 1.35, 0.9  # logits, stars
_CLICK_SLOPE = (-0.9, -0.5, -0.1)  # logits per standard deviation of the price, by segment
_BUY_SLOPE = (-1.1, -0.7, -0.3)
_CLICK_RATE, _BUY_RATE = 0.35, 0.4  # of impressions, of clicks
_STARS_MEAN, _STARS_NOISE = 3.5, 0.8
_APPEAL, _ACTIVITY = 0.6, 0.1  # standard deviations of what only an item or a user shows
_START, _DAYS, _SESSION = 1_700_000_000, 60, 6  # seconds, days, impressions


class _Items(NamedTuple):
    category: np.ndarray  # [N]
    brand: np.ndarray  # [N]
    style: np.ndarray  # [N] -1 or 1, hidden
    price: np.ndarray  # [N]
    suits: np.ndarray  # [N] standardized log price
    appeal: np.ndarray  # [N] logits, hidden
    quality: np.ndarray  # [brands] hidden


class _Log(NamedTuple):
    """Impressions in time order."""

    user: np.ndarray  # [n]
    item: np.ndarray  # [n]
    time: np.ndarray  # [n] seconds
    place: np.ndarray  # [n] among the user's impressions, from 0


class _Social(NamedTuple):
    circles: shop_social.Circles
    searches: shop_social.Searches
    added: dict[str, np.ndarray]  # {part: click logits [n]}


class _Users(NamedTuple):
    type: np.ndarray  # [U] hidden
    segment: np.ndarray  # [U]
    age: np.ndarray  # [U]
    activity: np.ndarray  # [U] logits, hidden


class _Tastes(NamedTuple):
    click: np.ndarray  # [types, categories] -1 or 1
    buy: np.ndarray
    stars: np.ndarray
    style: np.ndarray  # [types] -1 or 1: which of the two styles


def generate(
    to: Path,
    seed: int = 0,
    users: int = USERS,
    items: int = ITEMS,
    impressions: int = IMPRESSIONS,
    social: bool = False,
    requests: bool = False,
) -> dict[str, Any]:
    """Write `events.csv`, `items.csv`, `users.csv` and `truth.json` to a folder.

    An event is an impression, in time order: `user, item, time` (seconds), the outcomes `click`,
    `cart`, `buy` (0 or 1; the last two empty without a click) and `stars` (1 to 5; empty without a
    purchase), and the true `p_click`, `p_buy` (given a click) and expected `p_stars` (given a
    purchase). The same arguments write the same bytes. A user sees no item twice.

    Args:
      to: folder, created when missing.
      seed: of every draw.
      users: number of users, U.
      items: number of items, N.
      impressions: mean number a user sees; between two thirds and four thirds of it.
      social: also plant searches and circles of friends (see `shop_social`), and write
        `queries.csv` (user, time, query) and `ties.csv` (user, friend).
      requests: also plant a signal of the moment (see `shop_requests`): the events have the columns
        `device` and `place` as well.

    Returns:
      The content of `truth.json`: arguments, the best possible metrics over all rows, and the
      planted tables; under "social" and "requests" also those of what is planted on top, and the
      click AUC of probabilities that leave out one part of it, or all.

    Raises:
      ConfigError: fewer than 8 users, 16 items or 6 impressions, or a user would see over half of
        the items.

    >>> import tempfile
    >>> truth = generate(Path(tempfile.mkdtemp()), seed=1, users=60, items=90, impressions=30)
    >>> sorted(truth["best"])
    ['buy', 'click', 'stars']
    """
    if users < 8 or items < 16 or impressions < 6 or 2 * (impressions * 4 // 3) > items:
        raise ConfigError(
            f"shop: {users} users, {items} items, {impressions} impressions do not fit; at least "
            "8, 16, 6, and items at least 8/3 of the impressions"
        )
    sizes = {"users": users, "items": items, "impressions": impressions}
    return _generate(to, seed, sizes, social, requests)


def _generate(
    to: Path, seed: int, sizes: dict[str, int], social: bool, requests: bool
) -> dict[str, Any]:
    rng, users = np.random.default_rng(seed), sizes["users"]
    tastes, shelf, people = (
        _draw_tastes(rng),
        _draw_items(rng, sizes["items"]),
        _draw_users(rng, users),
    )
    log = _expose(rng, tastes, shelf, people, sizes["impressions"])
    # each on its own: who is shown what is drawn as without
    friends = _plant_social(seed, log, shelf, users) if social else None
    moments = _plant_requests(seed, log, shelf) if requests else None
    added = {"social": friends.added} if friends else {}
    added |= {"requests": moments.added} if moments else {}
    extra = sum(
        (part for parts in added.values() for part in parts.values()), np.zeros(len(log.user))
    )
    columns, intercepts = _respond(rng, tastes, shelf, people, log, extra)
    truth = {
        "version": _VERSION,
        "seed": seed,
        **sizes,
        "events": len(log.user),
        "best": _best(columns),
        "planted": _planted(tastes, shelf, people, intercepts),
    }
    to.mkdir(parents=True, exist_ok=True)
    (to / "truth.json").unlink(missing_ok=True)  # written last: a folder that has it is whole
    _write_tables(to, shelf, people, log, moments, columns)
    if friends:
        truth["social"] = _without(columns, friends.added) | {
            "circle": friends.circles.circle.tolist(),
            "taste": (shop_social.CIRCLE * friends.circles.taste).tolist(),
        }
        _write_social(to, friends.circles, friends.searches)
    if moments:
        truth["requests"] = _without(columns, moments.added) | moments.tastes
    (to / "truth.json").write_text(json.dumps(truth) + "\n", encoding="utf-8")
    return truth


def _plant_social(seed: int, log: _Log, shelf: _Items, users: int) -> _Social:
    rng, category = np.random.default_rng([seed, 1]), shelf.category[log.item]
    circles = shop_social.draw_circles(rng, users, len(BRANDS))
    searches = shop_social.draw_searches(rng, log.user, log.time, category, _SESSION)
    liked = circles.taste[circles.circle[log.user], shelf.brand[log.item]]
    wanted = searches.intent == category
    return _Social(
        circles,
        searches,
        {"queries": shop_social.INTENT * wanted, "ties": shop_social.CIRCLE * liked},
    )


def _plant_requests(seed: int, log: _Log, shelf: _Items) -> shop_requests.Moments:
    rng, category = np.random.default_rng([seed, 2]), shelf.category[log.item]
    return shop_requests.draw_moments(
        rng, log.user, log.time, log.place, category, _SESSION, len(CATEGORIES)
    )


def _without(
    columns: dict[str, Num[np.ndarray, " n"]], added: dict[str, Float[np.ndarray, " n"]]
) -> dict[str, Any]:
    """{"without": {part: click AUC of probabilities that leave it out}}, also of all parts."""
    known, parts = special.logit(columns["p_click"]), added | {"all": sum(added.values())}
    return {"without": {name: _auc(columns["click"], known - x) for name, x in parts.items()}}


def _best(columns: dict[str, Num[np.ndarray, " n"]]) -> dict[str, dict[str, float]]:
    clicked, bought = columns["click"] == 1, columns["buy"] == 1
    error = columns["stars"][bought] - columns["p_stars"][bought]
    return {
        "click": {"auc": _auc(columns["click"], columns["p_click"])},
        "buy": {"auc": _auc(columns["buy"][clicked], columns["p_buy"][clicked])},
        "stars": {"rmse": round(float(np.sqrt(np.mean(error**2))), 4)},
    }


def _planted(
    tastes: _Tastes, shelf: _Items, people: _Users, intercepts: dict[str, float]
) -> dict[str, Any]:
    return {
        "click": (_CLICK_TASTE * tastes.click).tolist(),
        "buy": (_BUY_TASTE * tastes.buy).tolist(),
        "stars": (_STARS_TASTE * tastes.stars).tolist(),
        "style": (_STYLE_TASTE * tastes.style).tolist(),
        "click_slope": list(_CLICK_SLOPE),
        "buy_slope": list(_BUY_SLOPE),
        "intercepts": intercepts,
        "brand_quality": shelf.quality.round(4).tolist(),
        "item_style": shelf.style.tolist(),
        "item_appeal": shelf.appeal.round(4).tolist(),
        "user_type": people.type.tolist(),
        "user_activity": people.activity.round(4).tolist(),
    }


def is_generated(folder: Path, seed: int = 0, social: bool = False, requests: bool = False) -> bool:
    """Whether `generate` of this version, with default sizes, filled the folder."""
    files = FILES + shop_social.FILES if social else FILES
    if not all((folder / name).is_file() for name in files):
        return False
    try:
        truth = json.loads((folder / "truth.json").read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        return False
    sizes = {"users": USERS, "items": ITEMS, "impressions": IMPRESSIONS}
    wanted = {"version": _VERSION, "seed": seed} | sizes
    if not isinstance(truth, dict) or {k: truth.get(k) for k in wanted} != wanted:
        return False
    return ("social" in truth, "requests" in truth) == (social, requests)


def _draw_tastes(rng: np.random.Generator) -> _Tastes:
    # A category is three random bits. Types 0, 1, 2 click by one bit, buy by another and rate by
    # the third, so that every combination of outcomes exists for every type; types 3, 4, 5 are
    # their opposites, so that the tables sum to zero.
    bits = rng.permutation(8)[:, None] >> np.arange(3) & 1
    signs = 2 * bits.T - 1  # [3, categories]
    both = np.concatenate([signs, -signs])
    order = np.arange(TYPES) // 3 * 3
    bit = np.arange(TYPES) % 3
    style = np.where(rng.permutation(TYPES) < TYPES // 2, 1, -1)
    click, buy, stars = (both[order + (bit + shift) % 3] for shift in range(3))
    return _Tastes(click, buy, stars, style)


def _draw_items(rng: np.random.Generator, count: int) -> _Items:
    category, brand = (
        rng.permutation(np.arange(count) % n) for n in (len(CATEGORIES), len(BRANDS))
    )
    style = np.where(rng.permutation(count) % 2, 1, -1)
    suits = stats.zscore(rng.normal(size=count))
    price = np.exp(3 + 0.8 * suits).round(2)
    quality = 0.7 * stats.zscore(rng.normal(size=len(BRANDS)))
    return _Items(category, brand, style, price, suits, rng.normal(0, _APPEAL, count), quality)


def _draw_users(rng: np.random.Generator, count: int) -> _Users:
    kind = rng.permutation(np.arange(count) % TYPES)
    segment = rng.permutation(np.arange(count) % len(SEGMENTS))
    # four users in five have an age group that says nothing
    age = np.where(rng.random(count) < 0.2, kind, rng.integers(len(AGES), size=count))
    return _Users(kind, segment, age, rng.normal(0, _ACTIVITY, count))


def _expose(
    rng: np.random.Generator, tastes: _Tastes, shelf: _Items, people: _Users, impressions: int
) -> _Log:
    """Who is shown what and when: popular and liked items a bit more."""
    users, items = len(people.type), len(shelf.category)
    seen = rng.integers(impressions * 2 // 3, impressions * 4 // 3, size=users, endpoint=True)
    most = int(seen.max())
    liking = 0.25 * rng.normal(size=items) + 0.2 * tastes.click[people.type][:, shelf.category]
    # the largest of (log weight + Gumbel noise) are a weighted sample without replacement
    best = np.argpartition(-(liking + rng.gumbel(size=(users, items))), most - 1, axis=1)[:, :most]
    shuffled = rng.permuted(best, axis=1)  # [U, most]
    starts = rng.integers(_DAYS * 86_400, size=(users, -(-most // _SESSION)))
    # sessions that a user does not have go behind the others, where no impression reads them
    starts[np.arange(starts.shape[1]) * _SESSION >= seen[:, None]] = _DAYS * 86_400
    starts.sort(axis=1)
    place = np.arange(most)
    times = _START + starts[:, place // _SESSION] + 60 * (place % _SESSION)
    times += rng.integers(60, size=times.shape)
    user, place = np.nonzero(place < seen[:, None])
    order = np.argsort(times[user, place], kind="stable")
    user, place = user[order], place[order]
    return _Log(user, shuffled[user, place], times[user, place], place)


def _respond(
    rng: np.random.Generator,
    tastes: _Tastes,
    shelf: _Items,
    people: _Users,
    log: _Log,
    extra: Float[np.ndarray, " n"],
) -> tuple[dict[str, Num[np.ndarray, " n"]], dict[str, float]]:
    """Outcome and probability columns (NaN where there is no outcome), and the intercepts.

    `extra` is added to the click logits.
    """
    user, item = log.user, log.item
    kind, segment, category = people.type[user], people.segment[user], shelf.category[item]
    suits, quality = shelf.suits[item], shelf.quality[shelf.brand[item]]
    click = people.activity[user] + shelf.appeal[item] + np.take(_CLICK_SLOPE, segment) * suits
    click += _CLICK_TASTE * tastes.click[kind, category]
    click += _STYLE_TASTE * tastes.style[kind] * shelf.style[item] + extra
    click_intercept = _intercept(click, _CLICK_RATE)
    p_click = special.expit(click_intercept + click)
    clicked = rng.random(len(user)) < p_click

    buy = _BUY_TASTE * tastes.buy[kind, category] + quality + np.take(_BUY_SLOPE, segment) * suits
    buy_intercept = _intercept(buy[clicked], _BUY_RATE)
    p_buy = special.expit(buy_intercept + buy)
    luck = rng.random(len(user))
    bought = clicked & (luck < p_buy)
    carted = clicked & (luck < np.sqrt(p_buy))  # every purchase was in the cart

    mean = _STARS_MEAN + _STARS_TASTE * tastes.stars[kind, category] + quality
    stars = np.clip(np.rint(mean + rng.normal(0, _STARS_NOISE, len(user))), 1, 5)
    # E[stars] = 1 + sum over s = 2..5 of P(stars >= s), and stars >= s above s - 1/2
    above = (mean[:, None] - (np.arange(2, 6) - 0.5)) / _STARS_NOISE
    columns = {
        "click": clicked.astype(np.float64),
        "cart": np.where(clicked, carted, np.nan),
        "buy": np.where(clicked, bought, np.nan),
        "stars": np.where(bought, stars, np.nan),
        "p_click": p_click.round(4),
        "p_buy": p_buy.round(4),
        "p_stars": (1 + special.ndtr(above).sum(axis=1)).round(4),
    }
    intercepts = {"click": click_intercept, "buy": buy_intercept, "stars": _STARS_MEAN}
    return columns, intercepts


def _intercept(logits: Float[np.ndarray, " n"], rate: float) -> float:
    """The constant that makes the mean probability equal to `rate`, by bisection."""
    low, high = -10.0, 10.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if special.expit(middle + logits).mean() < rate else (low, middle)
        )
    return round(low, 4)


def _auc(label: Float[np.ndarray, " n"], score: Float[np.ndarray, " n"]) -> float:
    positive = label == 1
    ranks = stats.rankdata(score)
    count = positive.sum()
    area = (ranks[positive].sum() - count * (count + 1) / 2) / (count * (~positive).sum())
    return round(float(area), 4)


def _write_tables(
    to: Path,
    shelf: _Items,
    people: _Users,
    log: _Log,
    moments: shop_requests.Moments | None,
    columns: dict[str, Num[np.ndarray, " n"]],
) -> None:
    user_ids = _user_ids(len(people.type))
    item_ids = np.array([f"i{i:04d}" for i in range(len(shelf.category))])
    brands, categories = np.take(BRANDS, shelf.brand), np.take(CATEGORIES, shelf.category)
    titles = [f"{b} {c} {i}" for i, (b, c) in enumerate(zip(brands, categories, strict=True))]
    whole = ("click", "cart", "buy", "stars")
    outcomes = {
        name: pa.array(values, from_pandas=True).cast(pa.int8() if name in whole else pa.float64())
        for name, values in columns.items()
    }
    events = {"user": user_ids[log.user], "item": item_ids[log.item], "time": log.time}
    if moments:
        devices = np.take(shop_requests.DEVICES, moments.device)
        events |= {"device": devices, "place": moments.place}
    _write(to / "events.csv", events | outcomes)
    _write(
        to / "items.csv",
        {
            "item": item_ids,
            "title": titles,
            "category": categories,
            "brand": brands,
            "price": shelf.price,
        },
    )
    segments, ages = np.take(SEGMENTS, people.segment), np.take(AGES, people.age)
    _write(to / "users.csv", {"user": user_ids, "segment": segments, "age_group": ages})


def _write_social(to: Path, circles: shop_social.Circles, searches: shop_social.Searches) -> None:
    ids = _user_ids(len(circles.circle))
    queries = {"user": ids[searches.user], "time": searches.time, "query": searches.text}
    _write(to / "queries.csv", queries)
    _write(to / "ties.csv", {"user": ids[circles.ties[:, 0]], "friend": ids[circles.ties[:, 1]]})


def _user_ids(count: int) -> np.ndarray:
    return np.array([f"u{i:05d}" for i in range(count)])


def _write(path: Path, columns: dict[str, Shaped[np.ndarray, " n"] | pa.Array | list[str]]) -> None:
    options = pa.csv.WriteOptions(quoting_style="needed")
    pa.csv.write_csv(pa.table(columns), path, options)
