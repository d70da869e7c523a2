"""Regularised user and item biases: how generous is the user, how liked is the item?

prediction(u, i) = mean + user bias + item bias, the baseline estimate of Koren (2010), "Factor in
the neighbors: scalable and accurate collaborative filtering", ACM TKDD 4(1), fitted by alternating
least squares: each bias is the mean residual of its rows, shrunk as if so many more rows with
residual 0 had been seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float32, Int, Num
from pydantic import Field

from mtrec_jax.baselines.contract import Interactions, check_ids
from mtrec_jax.errors import DataError
from mtrec_jax.types import FIRST

PROBABILITY = (1e-4, 1 - 1e-4)  # limits for binary labels: log loss stays finite


@dataclass(frozen=True, kw_only=True)
class Bias:
    """`kind = "bias"`: predicts binary and regression tasks, each by biases of its own."""

    kind: Literal["bias"] = "bias"
    user_regularization: Annotated[float, Field(ge=0)] = 15.0  # rows with residual 0 that are added
    item_regularization: Annotated[float, Field(ge=0)] = 10.0
    epochs: Annotated[int, Field(ge=1)] = 10

    def fit(self, interactions: Interactions) -> Biases:
        """Fit every task; rows without its label are left out.

        Raises:
          DataError: no row has a label, or an id is beyond the users or items.
        """
        check_ids(self.kind, interactions)
        return Biases({task: self._of_task(interactions, task) for task in interactions.kinds})

    def _of_task(self, interactions: Interactions, task: str) -> TaskBiases:
        labels = interactions.labels[task]
        labelled = ~np.isnan(labels)
        users, items = interactions.users[labelled], interactions.items[labelled]
        labels = labels[labelled].astype(np.float64)
        if not len(labels):
            raise DataError(f"bias: no training row has a label of task '{task}'; remove the task")
        mean = float(labels.mean())
        user_bias = np.zeros(interactions.n_users + FIRST)
        item_bias = np.zeros(interactions.n_items + FIRST)
        for _ in range(self.epochs):
            rest = labels - mean - user_bias[users]
            item_bias = _shrunk_means(items, rest, len(item_bias), self.item_regularization)
            rest = labels - mean - item_bias[items]
            user_bias = _shrunk_means(users, rest, len(user_bias), self.user_regularization)
        limits = float(labels.min()), float(labels.max())
        binary = interactions.kinds[task] == "binary"
        return TaskBiases(mean, user_bias, item_bias, PROBABILITY if binary else limits)


@dataclass(frozen=True)
class TaskBiases:
    """Mean and biases; those of padding and unknown ids are 0."""

    mean: float
    users: np.ndarray  # [n_users + 2] by user id
    items: np.ndarray  # [N + 2] by item id
    limits: tuple[float, float]  # predictions stay within


@dataclass(frozen=True)
class Biases:
    """Biases by task.

    >>> one = TaskBiases(3.0, np.array([0, 0, 1.0]), np.array([0, 0, -0.5]), (1.0, 5.0))
    >>> Biases({"stars": one}).predict("stars", np.array([2, 1, 99]), np.array([2, 2, 0]))
    array([3.5, 2.5, 3. ], dtype=float32)
    """

    tasks: dict[str, TaskBiases]

    def predict(
        self, task: str, users: Int[np.ndarray, " n"], items: Int[np.ndarray, " n"]
    ) -> Float32[np.ndarray, " n"] | None:
        """Predicted label of each pair of ids; an id that is not known has bias 0."""
        if task not in self.tasks:
            return None
        found = self.tasks[task]
        known_user = np.where((users >= 0) & (users < len(found.users)), users, 0)
        known_item = np.where((items >= 0) & (items < len(found.items)), items, 0)
        values = found.mean + found.users[known_user] + found.items[known_item]
        return np.clip(values, *found.limits).astype(np.float32)


def _shrunk_means(
    ids: Int[np.ndarray, " n"], rest: Num[np.ndarray, " n"], size: int, regularization: float
) -> Num[np.ndarray, " size"]:
    rows = np.bincount(ids, minlength=size) + regularization
    means = np.bincount(ids, rest, size) / np.maximum(rows, 1e-300)  # 0 of no rows
    means[:FIRST] = 0
    return means
