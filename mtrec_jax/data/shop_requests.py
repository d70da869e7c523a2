"""What the shop of requests plants on top of the shop: a signal of the moment.

    click logit += DEVICE * taste[device, category]           taste is +-1, four of each
                 + HOUR * taste[quarter of the day, category]
                 - PLACE * (place - 1)                        a list is read from the top

The device is the session's: three in four sessions run on the user's own. The quarter is that of
the time, UTC. The place, 1 to 6, is where the item stands in its session. All three are known
before the outcome, and no table but the log itself says them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

DEVICE, HOUR, PLACE = 0.8, 0.8, 0.3  # logits
DEVICES = ("phone", "tablet", "desktop")
_OWN, _QUARTER = 0.75, 6 * 3600  # share of sessions; seconds


class Moments(NamedTuple):
    """The moment of every impression, and what it adds to the click logit."""

    device: Int[np.ndarray, " n"]
    place: Int[np.ndarray, " n"]  # from 1
    added: dict[str, Float[np.ndarray, " n"]]  # by device, hour and place
    tastes: dict[str, list[list[float]]]  # logits by device or quarter, and category


def draw_moments(
    rng: np.random.Generator,
    user: Int[np.ndarray, " n"],
    time: Int[np.ndarray, " n"],
    place: Int[np.ndarray, " n"],
    category: Int[np.ndarray, " n"],
    session: int,
    categories: int,
) -> Moments:
    """Devices, places and tastes; a session is `session` impressions of a user.

    `place` counts a user's impressions from 0, `category` is that of the item shown.
    """
    signs = 2 * (np.arange(categories) % 2) - 1
    by_device, by_quarter = (
        rng.permuted(np.tile(signs, (count, 1)), axis=1) for count in (len(DEVICES), 4)
    )
    users, sessions = int(user.max()) + 1, int(place.max()) // session + 1
    own = rng.integers(len(DEVICES), size=(users, 1))
    other = rng.integers(len(DEVICES), size=(users, sessions))
    device = np.where(rng.random((users, sessions)) < _OWN, own, other)[user, place // session]
    in_session = place % session
    added = {
        "device": DEVICE * by_device[device, category],
        "hour": HOUR * by_quarter[time // _QUARTER % 4, category],
        "place": -PLACE * in_session,
    }
    tastes = {"device": (DEVICE * by_device).tolist(), "hour": (HOUR * by_quarter).tolist()}
    return Moments(device, in_session + 1, added, tastes)
