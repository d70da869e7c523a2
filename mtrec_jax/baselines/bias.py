"""Regularised user and item biases: how generous is the user, how liked is the item?

prediction(u, i) = mean + user bias + item bias, the baseline estimate of Koren (2010), "Factor in
the neighbors: scalable and accurate collaborative filtering", ACM TKDD 4(1), fitted by alternating
least squares: each bias is the mean residual of its rows, shrunk as if `regularization` more rows
with residual 0 had been seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int, Num

from mtrec_jax.baselines.popularity import SameForEveryone
from mtrec_jax.data.dataset import Lists
from mtrec_jax.errors import DataError
from mtrec_jax.types import FIRST

PROBABILITY = (1e-4, 1 - 1e-4)  # limits for binary labels: log loss stays finite


@dataclass(frozen=True)
class Bias:
    """Mean and biases; the biases of padding and unknown ids are 0."""

    mean: float
    users: np.ndarray  # [n_users + 2] float64, by user id
    items: np.ndarray  # [N + 2] float64, by item id
    limits: tuple[float, float]  # predictions stay within


def fit(
    users: Int[np.ndarray, " n"],
    items: Int[np.ndarray, " n"],
    labels: Num[np.ndarray, " n"],
    n_users: int,
    n_items: int,
    limits: tuple[float, float] | None = None,
    user_regularization: float = 15.0,
    item_regularization: float = 10.0,
    epochs: int = 10,
) -> Bias:
    """Fit the biases by alternating least squares.

    Args:
      users, items: ids of the interactions.
      labels: a rating or other number, or 0 / 1; rows whose label is nan are left out.
      n_users, n_items: how many real users and catalogue items there are.
      limits: lowest and highest prediction; None: those of the training labels. Pass
        `PROBABILITY` for binary labels.
      user_regularization, item_regularization: strength of the shrinkage, in rows.

    Raises:
      DataError: no row has a label, or an id is beyond `n_users` or `n_items`.

    >>> model = fit(np.array([2, 3]), np.array([2, 2]), np.array([5.0, 3.0]), 2, 1)
    >>> model.mean, bool(model.users[2] > 0 > model.users[3])
    (4.0, True)
    """
    labelled = ~np.isnan(labels)
    users, items, labels = users[labelled], items[labelled], labels[labelled].astype(np.float64)
    if not len(labels):
        raise DataError("bias: no training row has a label; give the task a column with values")
    for name, ids, size in (("user", users, n_users), ("item", items, n_items)):
        if ids.min() < 0 or ids.max() >= size + FIRST:
            raise DataError(
                f"bias: {name} ids {ids.min()} .. {ids.max()} go beyond 0 .. {size + FIRST - 1}; "
                f"pass n_{name}s as in the manifest"
            )
    mean = float(labels.mean())
    user_bias, item_bias = np.zeros(n_users + FIRST), np.zeros(n_items + FIRST)
    user_rows = np.bincount(users, minlength=len(user_bias)) + user_regularization
    item_rows = np.bincount(items, minlength=len(item_bias)) + item_regularization
    for _ in range(epochs):
        rest = labels - mean - user_bias[users]
        item_bias = np.bincount(items, rest, len(item_bias)) / item_rows
        item_bias[:FIRST] = 0
        rest = labels - mean - item_bias[items]
        user_bias = np.bincount(users, rest, len(user_bias)) / user_rows
        user_bias[:FIRST] = 0
    if limits is None:
        limits = float(labels.min()), float(labels.max())
    return Bias(mean, user_bias, item_bias, limits)


def predict(
    model: Bias, users: Int[np.ndarray, " n"], items: Int[np.ndarray, " n"]
) -> Float32[np.ndarray, " n"]:
    """Predicted label of each (user, item) pair of ids; an unknown id has bias 0.

    >>> model = Bias(3.0, np.array([0, 0, 1.0]), np.array([0, 0, -0.5]), (1.0, 5.0))
    >>> predict(model, np.array([2, 1, 99]), np.array([2, 2, 0]))
    array([3.5, 2.5, 3. ], dtype=float32)
    """
    known_user = np.where((users >= 0) & (users < len(model.users)), users, 0)
    known_item = np.where((items >= 0) & (items < len(model.items)), items, 0)
    values = model.mean + model.users[known_user] + model.items[known_item]
    return np.clip(values, *model.limits).astype(np.float32)


def scorer(model: Bias, histories: Lists | None = None) -> SameForEveryone:
    """Score by item bias: the user's own bias does not change the order of the items.

    >>> model = Bias(3.0, np.zeros(2), np.array([0, 0, -0.5, 0.25]), (1.0, 5.0))
    >>> scorer(model).block(np.array([0]), slice(0, 2))
    array([[2.5 , 3.25]], dtype=float32)
    """
    return SameForEveryone((model.mean + model.items[FIRST:]).astype(np.float32))
