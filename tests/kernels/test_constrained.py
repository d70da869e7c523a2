"""Lists of ids and quotas of groups: as the reference, as brute force, never short, never wrong."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import numpy as np
import pytest

from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.kernels import ItemIndex, constrained, cosine_topk, dot_topk
from mtrec_jax.types import Lists

RNG = np.random.default_rng(0)
COUNT, QUERY = 1001, np.array([[1, 0]])
ITEMS = RNG.normal(size=(COUNT, 16)).astype(np.float32)
QUERIES = RNG.normal(size=(8, 16)).astype(np.float32)
EXCLUDE = RNG.integers(-1, COUNT, (8, 9))
ALLOWED = RNG.random(COUNT) < 0.5
AMONG: Any = [RNG.integers(0, COUNT, n) for n in (1, 3, 9, 10, 12, 31, 0, 900)]
SHORT = [*AMONG[:7], AMONG[0]]
AMONG[4] = SHORT[4] = np.concatenate([AMONG[4], [-1, -1], AMONG[4]])
GROUPS = np.where(RNG.random(COUNT) < 0.9, 0, RNG.integers(-1, 5, COUNT))  # most by one author
SEVERAL = np.stack([GROUPS, np.where(RNG.random(COUNT) < 0.3, RNG.integers(5, 9, COUNT), -1)], 1)
LIMITS: list[Any] = [
    (dot_topk, {"among": AMONG}),
    (cosine_topk, {"among": AMONG, "exclude": EXCLUDE, "allowed": ALLOWED}),
    (dot_topk, {"groups": GROUPS, "at_most": 2}),
    (dot_topk, {"groups": SEVERAL, "at_most": 1 + np.arange(9) % 3}),
    (dot_topk, {"among": SHORT, "groups": GROUPS, "at_most": {0: 1}, "exclude": EXCLUDE}),
    pytest.param(
        *(cosine_topk, {"groups": GROUPS, "at_most": {0: 1, 3: 0}, "exclude": EXCLUDE}),
        marks=pytest.mark.slow,
    ),
]


@pytest.fixture(autouse=True)
def _long_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constrained, "_SHORT", 31)


def _same(found: Any, expected: Any) -> None:
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])


@pytest.mark.parametrize(("function", "limits"), LIMITS)
def test_as_the_reference_to_the_last_bit(function: Any, limits: dict[str, Any]) -> None:
    found = function(QUERIES, ITEMS, 10, **limits)
    _same(found, function(QUERIES, ITEMS, 10, implementation="reference", **limits))


@pytest.mark.parametrize(
    "limits",
    [
        {"among": SHORT, "exclude": EXCLUDE},
        pytest.param({"groups": GROUPS, "at_most": 1, "among": AMONG}, marks=pytest.mark.slow),
        pytest.param({"groups": GROUPS, "at_most": 1}, marks=pytest.mark.slow),
    ],
)
def test_over_eight_devices_as_on_one(limits: dict[str, Any]) -> None:
    mesh = jax.make_mesh((2, 4), ("data", "table"), (jax.sharding.AxisType.Auto,) * 2)
    one, eight = ItemIndex(ITEMS, metric="dot"), ItemIndex(ITEMS, metric="dot", mesh=mesh)
    _same(eight.search(QUERIES, 10, **limits), one.search(QUERIES, 10, **limits))


def test_by_hand() -> None:
    items = np.array([[1.0, 0], [1, 1], [2, 2], [0, 1], [1, 0], [-1, 0], [-1, 1], [-1, 2]])
    index = ItemIndex(items, ids=list("abcdefgh"))
    authors = np.array([0, 0, 1, 1, 0, 1, 0, 1])
    _, ids = index.search(QUERY, 3, among=[["e", "d", "a", "", "a"]])
    assert ids.tolist() == [["a", "e", "d"]]  # equal cosines: the first one
    _, ids = index.search(QUERY, 3, groups=authors, at_most=1)
    assert ids.tolist() == [["a", "c", ""]]
    _, ids = index.search(QUERY, 3, groups=authors, at_most={0: 2})
    assert ids.tolist() == [["a", "e", "c"]]
    assert index.search(QUERY, 3, groups=authors, at_most=0)[1].tolist() == [["", "", ""]]


def test_the_greedy_list_is_the_best_one_there_is() -> None:
    """Beside all lists of three; none is higher at any place."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        items, query = rng.integers(-3, 4, (8, 2)), rng.integers(-3, 4, (1, 2))
        groups, most = rng.integers(-1, 3, 8), rng.integers(0, 3, 3)
        found, ids = dot_topk(query, items, 3, groups=groups, at_most=most)
        good = [
            -np.sort(-(items[list(some)] @ query[0]))
            for some in itertools.combinations(range(8), 3)
            if (np.bincount(groups[list(some)] + 1, minlength=4)[1:] <= most).all()
        ]
        if good:
            np.testing.assert_array_equal(found[0], np.max(good, axis=0))
        else:
            assert -1 in ids


def test_lists_as_one_array_and_integers_of_any_kind() -> None:
    index = ItemIndex(ITEMS, metric="dot")
    lists = Lists(np.concatenate(SHORT).astype(np.int16), np.cumsum([0, *map(len, SHORT)]))
    _same(index.search(QUERIES, 4, among=lists), index.search(QUERIES, 4, among=SHORT))


def test_a_catalogue_of_one_author_who_stands_first_everywhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The others are at the end of the order: cut off anywhere before, one item is left."""
    items = np.ones((COUNT, 2), np.float32)
    items[:, 1] = np.linspace(0, 1, COUNT)
    authors, asked, index = np.zeros(COUNT, int), [], ItemIndex(items)
    authors[-20:] = np.arange(20) // 2 + 1
    top = index._top

    def counted(given: Any, k: int) -> Any:
        asked.append(k)
        return top(given, k)

    monkeypatch.setattr(index, "_top", counted)
    _, ids = index.search(QUERY, 8, groups=authors, at_most=1)
    assert ids.tolist() == [[0, *range(COUNT - 20, COUNT - 6, 2)]]
    assert asked == [32, 128]


def test_each_round_adds_an_item(monkeypatch: pytest.MonkeyPatch) -> None:
    """Authors one behind the other, each with more items than a round looks at."""
    monkeypatch.setattr(constrained, "_FIRST", 32)
    monkeypatch.setattr(constrained, "_LATER", 128)
    items = np.ones((COUNT, 2), np.float32)
    items[:, 1] = np.linspace(0, 1, COUNT)
    _, ids = ItemIndex(items).search(QUERY, 8, groups=np.arange(COUNT) // 300, at_most=1)
    assert ids.tolist() == [[0, 300, 600, 900, -1, -1, -1, -1]]


@pytest.mark.slow
def test_what_was_shown_before_may_be_nearly_everything() -> None:
    exclude = np.stack([RNG.permutation(COUNT)[:995] for _ in QUERIES])
    found = dot_topk(QUERIES, ITEMS, 10, exclude)
    _same(found, dot_topk(QUERIES, ITEMS, 10, exclude, implementation="reference"))
    assert ((found[1] >= 0).sum(axis=1) == 6).all()


def test_dropped_items_stand_in_no_list() -> None:
    items = ITEMS.copy()
    items[5] = np.nan
    index = ItemIndex(items, metric="dot", nan="drop")
    ids = index.search(ITEMS[:8], 10, among=[[5, 7]] * 8)[1]
    assert ids[5].tolist() == [7] + [-1] * 9


@pytest.mark.parametrize(
    ("limits", "error", "message"),
    [
        ({"among": [[1]] * 3}, DataError, r"among holds 3 lists for 8 queries; .*\[ids\] \* 8"),
        ({"among": [[1]] * 7 + [[2, 1001]]}, DataError, r"among\[7\]\[1\] is 1001, but there"),
        ({"among": [ALLOWED] * 8}, DataError, r"among\[0\] has .* bool.* belongs into `allowed`"),
        ({"among": 7}, DataError, "among is a int; pass a list of arrays"),
        ({"groups": GROUPS}, DataError, "groups and at_most belong together"),
        ({"groups": GROUPS[1:], "at_most": 1}, DataError, r"groups must .* N=1001, but has shape"),
        ({"groups": GROUPS - 1, "at_most": 1}, DataError, "groups holds -2; number groups from 0"),
        ({"groups": GROUPS + 9999, "at_most": 1}, DataError, "groups holds 10003; number groups"),
        ({"groups": GROUPS, "at_most": -1}, ConfigError, "at_most is -1; quotas are integers"),
        ({"groups": GROUPS, "at_most": {1: -1}}, ConfigError, r"at_most\[1\] is -1; quotas are"),
        ({"groups": GROUPS, "at_most": {-1: 1}}, ConfigError, "at_most: -1 is no group"),
        ({"groups": GROUPS, "at_most": [1, 2]}, ConfigError, "at_most holds 2 quotas for 5 groups"),
        ({"groups": GROUPS, "at_most": 1.5}, ConfigError, "at_most is 1.5; quotas are integers"),
    ],
)
def test_wrong_limits(limits: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ItemIndex(ITEMS).search(QUERIES, 3, **limits)
