"""What the social shop plants on top of the shop: searches with an intent, and circles of friends.

    click logit += INTENT where the session's search is for the item's category
    click logit += CIRCLE * taste[circle of the user, brand]          taste is +-1, five of each

A search stands just before each session, and its intent is the category of one of the items that
the session goes on to show. The text says it in one of several ways, with words around it that say
nothing. Four friends in five are of the user's own circle. A user's own past shows the circle's
taste slowly, the pooled responses of the friends show it at once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

INTENT, CIRCLE = 2.0, 0.8  # logits
FILES = ("queries.csv", "ties.csv")
_CIRCLE_SIZE, _FRIENDS, _INSIDE = 20, 6, 0.8  # users; ties a user makes; share inside the circle
_PHRASES = {
    "books": ("novel", "paperback", "crime story", "gift for reader", "bestseller"),
    "garden": ("garden hose", "seeds", "plant pot", "gift for gardener", "lawn rake"),
    "kitchen": ("frying pan", "chef knife", "mixing bowl", "gift for cook", "kettle"),
    "music": ("guitar strings", "vinyl record", "headphones", "gift for musician", "drum"),
    "sport": ("running shoes", "tennis ball", "yoga mat", "gift for athlete", "dumbbell"),
    "tools": ("cordless drill", "hammer", "saw blade", "gift for builder", "toolbox"),
    "toys": ("puzzle", "board game", "building blocks", "gift for child", "doll"),
    "travel": ("suitcase", "rucksack", "neck pillow", "gift for traveller", "city map"),
}
_AROUND = ("", "", "cheap ", "best ", "new ", "good ")


class Circles(NamedTuple):
    """Who belongs together, what they like, and who is whose friend."""

    circle: Int[np.ndarray, " U"]
    taste: Int[np.ndarray, "circles brands"]  # -1 or 1
    ties: Int[np.ndarray, "n 2"]  # (user, friend), both ways, each pair once


class Searches(NamedTuple):
    """The intent at every impression, and the searches that say it, in time order."""

    intent: Int[np.ndarray, " n"]  # category
    user: Int[np.ndarray, " q"]
    time: Int[np.ndarray, " q"]
    text: np.ndarray  # [q]


def draw_circles(rng: np.random.Generator, users: int, brands: int) -> Circles:
    """Circles of about 20 users, their tastes and their ties."""
    count = max(users // _CIRCLE_SIZE, 1)
    circle = rng.permutation(np.arange(users) % count)
    taste = rng.permuted(np.tile(2 * (np.arange(brands) % 2) - 1, (count, 1)), axis=1)
    members, sizes = np.argsort(circle, kind="stable"), np.bincount(circle)
    first, place = np.cumsum(sizes) - sizes, np.empty(users, int)
    place[members] = np.arange(users) - first[circle[members]]
    shape = (users, _FRIENDS)
    size = sizes[circle][:, None]
    step = rng.integers(1, np.maximum(size, 2), size=shape)
    near = members[first[circle][:, None] + (place[:, None] + step) % size]
    friend = np.where(rng.random(shape) < _INSIDE, near, rng.integers(users, size=shape))
    pairs = np.stack([np.repeat(np.arange(users), _FRIENDS), friend.reshape(-1)], axis=1)
    pairs = np.unique(np.concatenate([pairs, pairs[:, ::-1]]), axis=0)
    return Circles(circle, taste, pairs[pairs[:, 0] != pairs[:, 1]])


def draw_searches(
    rng: np.random.Generator,
    user: Int[np.ndarray, " n"],
    time: Int[np.ndarray, " n"],
    category: Int[np.ndarray, " n"],
    session: int,
) -> Searches:
    """A search before each session; a session is `session` impressions of a user.

    Impressions are in time order; `category` is that of the item shown.
    """
    order = np.argsort(user, kind="stable")
    sizes = np.bincount(user)
    place = np.arange(len(user)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    begins = np.flatnonzero(place % session == 0)  # places in `order` where sessions begin
    lengths = np.diff(begins, append=len(user))
    wanted = category[order[begins + rng.integers(lengths)]]
    intent = np.empty(len(user), int)
    intent[order] = np.repeat(wanted, lengths)
    head = order[begins]
    phrases = np.array(list(_PHRASES.values()))
    phrase = phrases[wanted, rng.integers(phrases.shape[1], size=len(wanted))]
    text = np.char.add(rng.choice(_AROUND, size=len(wanted)), phrase)
    when = time[head] - rng.integers(1, 30, size=len(head))
    by_time = np.lexsort((user[head], when))
    return Searches(intent, user[head][by_time], when[by_time], text[by_time])
