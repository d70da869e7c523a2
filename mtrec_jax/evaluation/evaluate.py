"""One split, one model, one protocol: every task's metrics, the orders, and the baselines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from mtrec_jax.config import Experiment, fusion_objective
from mtrec_jax.data.dataset import Lists, Prepared
from mtrec_jax.data.pipeline import evaluation_batches
from mtrec_jax.evaluation.comparison import Collected, Metrics, compare, seen_items
from mtrec_jax.evaluation.inference import Inference, pad_rows, predictions, to_index
from mtrec_jax.evaluation.metrics import (
    Statistic,
    auc,
    bootstrap_interval,
    ranking_metrics,
    ranking_statistics,
    task_metrics,
    task_statistics,
)
from mtrec_jax.kernels import cosine_topk, target_rank
from mtrec_jax.types import FIRST, PyTree, UserStates


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluation.json` holds, but for the count of looks at the test set."""

    split: str
    protocol: str
    fingerprint: str
    tasks: dict[str, Metrics]
    baselines: dict[str, Metrics] = field(default_factory=dict)
    orders: dict[str, Metrics] = field(default_factory=dict)
    intervals: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    targets: dict[str, int] = field(default_factory=dict)  # {task: examples behind its metrics}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; undefined metrics are null."""
        return _without_nan(dataclasses.asdict(self))


def evaluate(
    experiment: Experiment,
    prepared: Prepared,
    inference: Inference,
    params: PyTree,
    tables: dict[str, jax.Array],
    split: str,
    full: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Evaluate parameters on a split.

    Args:
      experiment: tasks, ks, baselines.
      prepared: the data.
      inference: compiled passes of the model.
      params, tables: what is evaluated.
      split: "train", "validation" or "test".
      full: also the orders, the baselines and the bootstrap intervals; training leaves them out.
      progress: told what is being computed.
    """
    say = progress or (lambda text: None)
    manifest, config = prepared.manifest, experiment.evaluate
    say("model")
    vectors = inference.item_vectors(params, tables) if manifest.items else np.zeros((0, 1))
    collected = collect(experiment, prepared, inference, params, tables, vectors, split)
    tasks, statistics = _task_metrics(experiment, prepared, collected)
    seen = seen_items(prepared, split, collected.user) if config.exclude_seen else None
    retrieval = next((n for n, t in experiment.tasks.items() if t.kind == "retrieval"), None)
    rows = np.zeros(0, np.int64)
    if retrieval is not None:
        rows = np.flatnonzero(_is_target(collected, retrieval, manifest.items))
        ranks = model_ranks(collected, vectors, rows, seen)
        tasks[retrieval] = ranking_metrics(ranks, config.ks)
        statistics[retrieval] = ranking_statistics(ranks, config.ks), len(rows)
    result = Evaluation(
        split=split,
        protocol=manifest.protocol,
        fingerprint=manifest.fingerprint,
        tasks={name: tasks[name] for name in experiment.tasks},
        targets={name: statistics[name][1] for name in experiment.tasks},
    )
    if not full:
        return result
    say("orders")
    orders = _orders(experiment, inference, params, collected, vectors, rows, retrieval, seen)
    say("baselines")
    baselines = compare(experiment, prepared, collected, rows, retrieval, seen, split)
    say("intervals")
    return dataclasses.replace(
        result,
        orders=orders,
        baselines=baselines,
        intervals=_intervals(statistics, config.bootstrap),
    )


def collect(
    experiment: Experiment,
    prepared: Prepared,
    inference: Inference,
    params: PyTree,
    tables: dict[str, jax.Array],
    vectors: jax.Array | np.ndarray,
    split: str,
) -> Collected:
    """Run the model over a split and keep its targets, in the order of the file."""
    parts: list[Collected] = []
    size, dtype = experiment.evaluate.batch_size, experiment.train.precision
    for batch in evaluation_batches(prepared, split, size, dtype):
        on_device = batch._replace(row=batch.row.astype(np.int32))
        states = inference.users(params, tables, vectors, on_device)
        outputs = inference.rank(params, states, vectors, batch.candidate)
        r, p = np.nonzero(np.asarray(batch.row) >= 0)
        mask = {n: np.asarray(m)[r, p] > 0 for n, m in batch.mask.items()}
        parts.append(
            Collected(
                user=np.asarray(batch.user)[r],
                candidate=np.asarray(batch.candidate)[r, p],
                labels={
                    n: np.where(mask[n], np.asarray(v)[r, p], np.nan)
                    for n, v in batch.labels.items()
                },
                logits={n: np.asarray(v)[r, p] for n, v in outputs.logits.items()},
                fused=np.asarray(outputs.fused)[r, p],
                vectors=np.asarray(states.vectors)[r, p],
                context=np.asarray(states.context)[r],
            )
        )
    joined = jax.tree.map(lambda *a: np.concatenate(a), *(vars(part) for part in parts))
    return Collected(**joined)


def padded(lists: Lists, rows: np.ndarray, width: int) -> np.ndarray:
    """Some of the lists as one array [n, width], filled with -1."""
    found = np.full((len(rows), width), -1, np.int32)
    for i, row in enumerate(rows):
        values = lists[row]
        found[i, : len(values)] = values
    return found


def model_ranks(
    collected: Collected, vectors: jax.Array | np.ndarray, rows: np.ndarray, seen: Lists | None
) -> np.ndarray:
    """Rank of each target among all items by cosine, seen ones excluded: [n], 0 = first."""
    items, block = vectors[FIRST:], 512
    width = int(np.diff(seen.offsets).max()) if seen is not None and len(seen) else 0
    ranks = np.zeros(len(rows), np.int64)
    for start in range(0, len(rows), block):
        part = rows[start : start + block]
        queries = pad_rows(collected.vectors[part], block)
        targets = pad_rows(to_index(collected.candidate[part]), block)
        exclude = None
        if seen is not None and width:
            exclude = pad_rows(padded(seen, part, width), block, -1)
        found = target_rank(queries, items, targets.astype(np.int32), exclude)
        ranks[start : start + block] = np.asarray(found)[: len(part)]
    return ranks


def _is_target(collected: Collected, retrieval: str, items: int) -> np.ndarray:
    known = (collected.candidate >= FIRST) & (collected.candidate < items + FIRST)
    return known & ~np.isnan(collected.labels[retrieval])


def _task_metrics(
    experiment: Experiment, prepared: Prepared, collected: Collected
) -> tuple[dict[str, Metrics], dict[str, tuple[dict[str, Statistic], int]]]:
    """Metrics of the tasks with a tower, and their statistics with the number of examples."""
    found: dict[str, Metrics] = {}
    statistics: dict[str, tuple[dict[str, Statistic], int]] = {}
    values = predictions(experiment, prepared.manifest, collected.logits)
    for name, task in experiment.tasks.items():
        if task.kind == "retrieval":
            continue
        observed = ~np.isnan(collected.labels[name])
        labels, predicted = collected.labels[name][observed], values[name][observed]
        found[name] = task_metrics(task.kind, labels, predicted)
        statistics[name] = task_statistics(task.kind, labels, predicted), len(labels)
    return found, statistics


def _orders(
    experiment: Experiment,
    inference: Inference,
    params: PyTree,
    collected: Collected,
    vectors: jax.Array | np.ndarray,
    rows: np.ndarray,
    retrieval: str | None,
    seen: Lists | None,
) -> dict[str, Metrics]:
    """The fused order beside each task's own order.

    "ndcg@k": the retrieved candidates put in this order; "value@k": the same, each target counted
    by its worth under the fusion objective; "auc TASK": how well the order separates the observed
    labels of a binary task of the objective.
    """
    objective = fusion_objective(experiment)
    binary = [n for n in objective if experiment.tasks[n].kind == "binary"]
    scores = {"fused": collected.fused}
    scores |= {n: _order_score(collected.logits[n]) for n in experiment.tasks}
    found: dict[str, Metrics] = {name: {} for name in scores}
    if retrieval is not None and len(rows):
        ranks = _rerank(experiment, inference, params, collected, vectors, rows, seen)
        worth = sum(w * np.nan_to_num(collected.labels[n][rows]) for n, w in objective.items())
        for name in found:
            for k in experiment.evaluate.ks:
                gain = np.where(ranks[name] < k, 1 / np.log2(ranks[name] + 2.0), 0)
                found[name][f"ndcg@{k}"] = float(gain.mean())
                total = float(np.sum(worth))
                found[name][f"value@{k}"] = float((gain * worth).sum()) / total if total else 0.0
    for task in binary:
        observed = ~np.isnan(collected.labels[task])
        for name, score in scores.items():
            found[name][f"auc {task}"] = auc(collected.labels[task][observed], score[observed])
    return found if len(experiment.tasks) > 1 else {}


def _order_score(logits: np.ndarray) -> np.ndarray:
    """One number an example to sort by; of classes the expected one."""
    if logits.ndim == 1:
        return logits
    exponential = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights = exponential / exponential.sum(axis=-1, keepdims=True)
    return weights @ np.arange(logits.shape[-1])


def _rerank(
    experiment: Experiment,
    inference: Inference,
    params: PyTree,
    collected: Collected,
    vectors: jax.Array | np.ndarray,
    rows: np.ndarray,
    seen: Lists | None,
) -> dict[str, np.ndarray]:
    """Rank of the target when the retrieved candidates are put in each order; {order: [n]}."""
    block, items = experiment.evaluate.batch_size, vectors[FIRST:]
    k = min(experiment.evaluate.candidates, len(items))
    width = int(np.diff(seen.offsets).max()) if seen is not None and len(seen) else 0
    parts: list[dict[str, np.ndarray]] = []
    for start in range(0, len(rows), block):
        part = rows[start : start + block]
        users = pad_rows(collected.vectors[part], block)
        exclude = None
        if seen is not None and width:
            lists = padded(seen, part, width)
            target = to_index(collected.candidate[part])
            lists[lists == target[:, None]] = -1  # the target itself may be recommended again
            exclude = pad_rows(lists, block, -1)
        ids = np.asarray(cosine_topk(users, items, k, exclude)[1]) + FIRST  # -1 becomes unknown
        context = pad_rows(collected.context[part], block)
        states = UserStates(np.broadcast_to(users[:, None], (block, k, users.shape[1])), context)
        outputs = inference.rank(params, states, vectors, ids.astype(np.int32))
        orders = {"fused": np.asarray(outputs.fused)}
        for name, logits in outputs.logits.items():
            flat = np.asarray(logits).reshape(block * k, *logits.shape[2:])
            orders[name] = _order_score(flat).reshape(block, k)
        hit = ids[: len(part)] == collected.candidate[part][:, None]
        real = ids[: len(part)] >= FIRST
        parts.append({n: _rank_in_list(s[: len(part)], hit, real) for n, s in orders.items()})
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def _rank_in_list(scores: np.ndarray, hit: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Rank of the marked candidate by score, ties by retrieval order; a large rank if absent."""
    scores = np.where(real, scores, -np.inf)
    place = hit.argmax(axis=1)[:, None]
    own = np.take_along_axis(scores, place, axis=1)
    earlier = np.arange(scores.shape[1])[None] < place
    rank = ((scores > own) | ((scores == own) & earlier)).sum(axis=1)
    return np.where(hit.any(axis=1), rank, np.iinfo(np.int32).max)


def _intervals(
    statistics: dict[str, tuple[dict[str, Statistic], int]], resamples: int
) -> dict[str, dict[str, tuple[float, float]]]:
    """95 % bootstrap intervals over the targets."""
    if not resamples:
        return {}
    return {
        task: {m: bootstrap_interval(s, n, resamples) for m, s in by_metric.items()}
        for task, (by_metric, n) in statistics.items()
    }


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and np.isnan(value) else value
