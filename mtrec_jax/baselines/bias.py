"""Regularised user and item biases: how generous is the user, how liked is the item?

prediction(u, i) = mean + user bias + item bias, the baseline estimate of Koren (2010), "Factor in
the neighbors: scalable and accurate collaborative filtering", ACM TKDD 4(1), fitted by alternating
least squares: each bias is the mean residual of its rows, shrunk as if `regularization` more rows
with residual 0 had been seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Int, Num
from pydantic import Field

from mtrec_jax.baselines.contract import Interactions
from mtrec_jax.errors import DataError
from mtrec_jax.types import FIRST

PROBABILITY = (1e-4, 1 - 1e-4)  # limits for binary labels: log loss stays finite


@dataclass(frozen=True, kw_only=True)
class Bias:
    """Biases for each binary and regression task."""

    kind: Literal["bias"] = "bias"
    user_regularization: Annotated[float, Field(ge=0)] = 15.0  # in rows
    item_regularization: Annotated[float, Field(ge=0)] = 10.0
    epochs: Annotated[int, Field(ge=1)] = 10

    def fit(self, train: Interactions) -> Biases:
        """Fit the biases of each task.

        Raises:
          DataError: no row has a label of a task.
        """
        return Biases(
            {
                name: self.fit_task(
                    train, train.labels[name], PROBABILITY if kind == "binary" else None
                )
                for name, kind in train.kinds.items()
            }
        )

    def fit_task(
        self,
        train: Interactions,
        labels: Num[np.ndarray, " n"],
        limits: tuple[float, float] | None = None,
    ) -> TaskBias:
        """Fit the biases of one task by alternating least squares.

        Args:
          train: whose users and items the labels are of.
          labels: a rating or other number, or 0 / 1; rows whose label is nan are left out.
          limits: lowest and highest prediction; None: those of the training labels.

        >>> train = Interactions(np.array([2, 3]), np.array([2, 2]), 2, 1)
        >>> model = Bias().fit_task(train, np.array([5.0, 3.0]))
        >>> model.mean, bool(model.users[2] > 0 > model.users[3])
        (4.0, True)
        """
        labelled = ~np.isnan(labels)
        users, items = train.users[labelled], train.items[labelled]
        labels = labels[labelled].astype(np.float64)
        if not len(labels):
            raise DataError("bias: no training row has a label; give the task a column with values")
        mean = float(labels.mean())
        user_bias, item_bias = np.zeros(train.n_users + FIRST), np.zeros(train.n_items + FIRST)
        user_rows = np.bincount(users, minlength=len(user_bias)) + self.user_regularization
        item_rows = np.bincount(items, minlength=len(item_bias)) + self.item_regularization
        for _ in range(self.epochs):
            rest = labels - mean - user_bias[users]
            item_bias = np.bincount(items, rest, len(item_bias)) / np.maximum(item_rows, 1e-9)
            item_bias[:FIRST] = 0
            rest = labels - mean - item_bias[items]
            user_bias = np.bincount(users, rest, len(user_bias)) / np.maximum(user_rows, 1e-9)
            user_bias[:FIRST] = 0
        limits = limits or (float(labels.min()), float(labels.max()))
        return TaskBias(mean, user_bias, item_bias, limits)


@dataclass(frozen=True)
class TaskBias:
    """Mean and biases; the biases of padding and unknown ids are 0."""

    mean: float
    users: np.ndarray  # [n_users + 2] float64, by user id
    items: np.ndarray  # [N + 2] float64, by item id
    limits: tuple[float, float]  # predictions stay within

    def predict(self, users: Int[np.ndarray, " n"], items: Int[np.ndarray, " n"]) -> np.ndarray:
        """Predicted label [n] of each pair of ids; an unknown id has bias 0.

        >>> model = TaskBias(3.0, np.array([0, 0, 1.0]), np.array([0, 0, -0.5]), (1.0, 5.0))
        >>> model.predict(np.array([2, 1, 99]), np.array([2, 2, 0]))
        array([3.5, 2.5, 3. ], dtype=float32)
        """
        known_user = np.where((users >= 0) & (users < len(self.users)), users, 0)
        known_item = np.where((items >= 0) & (items < len(self.items)), items, 0)
        values = self.mean + self.users[known_user] + self.items[known_item]
        return np.clip(values, *self.limits).astype(np.float32)


@dataclass(frozen=True)
class Biases:
    """The biases of each task."""

    tasks: dict[str, TaskBias]

    def predict(
        self, users: Int[np.ndarray, " n"], items: Int[np.ndarray, " n"]
    ) -> dict[str, np.ndarray]:
        """{task: predicted labels [n]} of pairs of ids."""
        return {name: model.predict(users, items) for name, model in self.tasks.items()}
