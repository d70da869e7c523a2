"""Wrong arguments from Python: an error of this library that names the argument and the remedy.

The calls run in a process without the tests' type checks, which would refuse them first.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mtrec_jax.train.run import Run

TASKS = "tasks={'next': 'retrieval'}"
COLUMNS = "user='u', item='i', time='t'"
CASES = {  # {call: (class of the error, what its message says)}
    # users, items, k, filters, histories
    "r.recommend(7)": ("DataError", "users: 7 is no list; pass [7]"),
    "r.recommend(None)": ("DataError", "users: None is no list"),
    "r.recommend('u00001')": ("DataError", "users: 'u00001' is one text; pass a list of ids"),
    "r.recommend({'u00001': 1})": ("DataError", "users: {'u00001': 1} is a dict; pass a list"),
    "r.recommend(pandas.DataFrame({'user': ['u00001']}))": ("DataError", "pass a list, or one col"),
    "r.recommend(pa.table({'user': ['u00001']}))": ("DataError", "is a Table; pass a list, or one"),
    "r.recommend([['u00001']])": ("DataError", "users[0]: ['u00001'] is no id"),
    "r.recommend(np.array([['a'], ['b']]))": ("DataError", "users[0]: array(['a'], dtype='<U1') i"),
    "r.recommend(['u00001'], k=2.5)": ("DataError", "k = 2.5: a whole number between 1 and the 60"),
    "r.recommend(['u00001'], k='3')": ("DataError", "k = '3': a whole number between 1 and the 60"),
    "r.recommend(['u00001'], k=None)": ("DataError", "k = None: a whole number between 1 and"),
    "r.recommend(['u00001'], k=True)": ("DataError", "k = True: a whole number between 1 and"),
    "r.recommend(['u00001'], k=0)": ("DataError", "k = 0: between 1 and the 60 items"),
    "next(r.recommend_all(k='3'))": ("DataError", "k = '3': a whole number between 1 and the 60"),
    "r.recommend(['u00001'], on_unknown='popluar')": (
        "ConfigError",
        "on_unknown: 'popluar' is not one of 'popular', 'model', 'error'. Did you mean 'popular'?",
    ),
    "r.recommend(['u00001'], on_unknown=None)": ("ConfigError", "on_unknown: None is not one of"),
    "r.recommend(['u00001'], exclude_seen='no')": (
        "ConfigError",
        "exclude_seen: 'no' is not one of True, False",
    ),
    "next(r.recommend_all(exclude_seen=1))": ("ConfigError", "exclude_seen: 1 is not one of True"),
    "r.recommend(['u00001'], allowed=7)": ("DataError", "allowed: 7 is no list; pass [7]"),
    "r.recommend(['u00001'], blocked=7)": ("DataError", "blocked: 7 is no list; pass [7]"),
    "r.recommend(['u00001'], blocked=[['i0001']])": ("DataError", "blocked[0]: ['i0001'] is no id"),
    "r.recommend(['a'], histories=7)": ("DataError", "histories: 7 is no list"),
    "r.recommend(['a'], histories={'item': ['i0001']})": ("DataError", "histories: {'item': ['i0"),
    "r.recommend(['a'], histories=[7])": ("DataError", "histories[0]: 7 is no list; pass [7]"),
    "r.recommend(['a'], histories=[None])": ("DataError", "histories[0]: None is no list"),
    "r.recommend(['a'], histories=[{'item': 'i0001'}])": (
        "DataError",
        "histories[0]: 'i0001' is one text",
    ),
    "r.recommend(['a'], histories=[{'item': ['i0001'], 'click': 1}])": (
        "DataError",
        "histories[0], click: 1 is no list; pass [1]",
    ),
    "r.recommend(['a'], histories=[{7: ['i0001']}])": (
        "DataError",
        "histories[0]: has 7; it needs item",
    ),
    "r.predict(7, ['i0001'])": ("DataError", "users: 7 is no list"),
    "r.predict(['u00001'], None)": ("DataError", "items: None is no list"),
    "r.predict_rows(7)": ("DataError", "table 'rows' (int) cannot be read"),
    "r.similar_items(['i0001'])": ("DataError", "item: ['i0001'] is no id; pass a text or a num"),
    "r.similar_items('i0001', k='3')": ("DataError", "k = '3': a whole number between 1 and"),
    "r.recommend(['u00001']).save(7)": (
        "DataError",
        "path: 7 is no path; pass a text or a pathlib",
    ),
    # folders and runs
    "mtrec_jax.Recommender(7)": ("DataError", "run: 7 is no path"),
    "mtrec_jax.open_run(7)": ("DataError", "folder: 7 is no path"),
    "mtrec_jax.open_run(r.run.folder, prepared=7)": ("DataError", "prepared: 7 is no path"),
    "mtrec_jax.open_prepared(None)": ("DataError", "folder: None is no path"),
    "mtrec_jax.evaluate_run(7)": ("DataError", "run: 7 is no path"),
    "mtrec_jax.evaluate_run(r.run, 'tset')": (
        "ConfigError",
        "split: 'tset' is not one of 'train', 'validation', 'test'. Did you mean 'test'?",
    ),
    "mtrec_jax.compare('runs/shop')": ("ConfigError", "runs: 'runs/shop' is one text; pass a list"),
    "mtrec_jax.compare([r.run])": ("ConfigError", "name two or more to compare"),
    "mtrec_jax.train_run('shop', r.prepared, 'x')": (
        "ConfigError",
        "experiment: 'shop' is a str, not a Experiment; pass what load_experiment gives",
    ),
    "mtrec_jax.train_run(r.experiment, 'prepared/shop', 'x')": (
        "ConfigError",
        "prepared: 'prepared/shop' is a str, not a Prepared; pass what prepare or open_prepared",
    ),
    "mtrec_jax.train_run(r.experiment, r.prepared, 7)": ("DataError", "run: 7 is no path"),
    "mtrec_jax.train_run(r.experiment, r.prepared, 'x', optimizer='adam')": (
        "ConfigError",
        "optimizer: 'adam' is a str, not a GradientTransformation; pass an optax optimizer",
    ),
    "mtrec_jax.prepare('shop', 'data', 'x')": ("ConfigError", "experiment: 'shop' is a str, not a"),
    "mtrec_jax.prepare(r.experiment, 7, 'x')": ("DataError", "data: 7 is no path"),
    "mtrec_jax.prepare(r.experiment, 'data', None)": ("DataError", "out: None is no path"),
    "mtrec_jax.prepare(r.experiment, None, 'x', tables=[events])": (
        "DataError",
        "tables: a list; pass a mapping such as {'events': table}",
    ),
    "mtrec_jax.prepare(r.experiment, None, 'x', tables=events)": ("DataError", "tables: a Table; "),
    "mtrec_jax.prepare(r.experiment, 'data', 'x', engine='polars')": (
        "ConfigError",
        "engine: 'polars' is not one of 'duckdb', 'spark'",
    ),
    "mtrec_jax.prepare(r.experiment, 'data', 'x', memory=4)": ("ConfigError", "memory: 4 is a int"),
    "mtrec_jax.prepare(r.experiment, 'data', 'x', master=None)": ("ConfigError", "master: None"),
    # configurations
    "mtrec_jax.load_experiment(7)": ("ConfigError", "config: 7 is neither a path nor a name"),
    "mtrec_jax.load_experiment('shop', 'model.width=8')": (
        "ConfigError",
        "overrides: 'model.width=8' is one text; pass a list",
    ),
    "mtrec_jax.load_experiment('shop', 7)": ("ConfigError", "overrides: 7 is no list"),
    "mtrec_jax.load_experiment('shop', [3])": ("ConfigError", "3: write it as key=value"),
    "mtrec_jax.load_experiment('shop', [('model.width', 8)])": ("ConfigError", "write it as key=v"),
    "mtrec_jax.load_experiment('shop', {7: 8})": ("ConfigError", "7: write it as"),
    "mtrec_jax.load_experiment('shop', {'model.width': [8]})": ("ConfigError", "model.width: "),
    "mtrec_jax.parse_experiment([])": ("ConfigError", "configuration: [] is a list, not a mapping"),
    "mtrec_jax.parse_experiment({'name': 'x', 7: {}})": (
        "ConfigError",
        "7: Keys should be strings",
    ),
    "mtrec_jax.parse_experiment({'name': 'x', 'tasks': ['a']})": ("ConfigError", "tasks: "),
    # fit
    f"mtrec_jax.fit(events, {COLUMNS}, tasks=['next'])": (
        "ConfigError",
        "tasks: ['next'] is a list, not a mapping; write tasks={'next_item': 'retrieval'}",
    ),
    f"mtrec_jax.fit(events, {COLUMNS}, tasks='retrieval')": (
        "ConfigError",
        "tasks: 'retrieval' is",
    ),
    f"mtrec_jax.fit(events, {COLUMNS}, tasks=None)": ("ConfigError", "tasks: None is a NoneType"),
    f"mtrec_jax.fit(events, {COLUMNS}, tasks={{}})": (
        "ConfigError",
        "tasks: at least one is neede",
    ),
    f"mtrec_jax.fit(events, {COLUMNS}, tasks={{'next': 3}})": (
        "ConfigError",
        "tasks.next: 3 is neither a text nor a mapping",
    ),
    f"mtrec_jax.fit(events, {COLUMNS}, {TASKS}, features=['r'])": (
        "ConfigError",
        "features: ['r'] is a list, not a mapping; write features={'genre': {'on': 'item'}}",
    ),
    f"mtrec_jax.fit(events, {COLUMNS}, {TASKS}, features={{'r': 'item'}})": (
        "ConfigError",
        "features.r: 'item' is not one of 'categorical'",
    ),
    f"mtrec_jax.fit(events, {COLUMNS}, {TASKS}, settings=['train.steps=3'])": (
        "ConfigError",
        "settings: ['train.steps=3'] is a list, not a mapping; write settings={'train.steps': 300}",
    ),
    f"mtrec_jax.fit(events, {COLUMNS}, {TASKS}, settings={{'train': 3}})": (
        "ConfigError",
        "train: ",
    ),
    f"mtrec_jax.fit(events, {COLUMNS}, {TASKS}, settings={{'name': 'x', 'train.stps': 3}})": (
        "ConfigError",
        "train.stps: unknown key. Did you mean 'steps'?",
    ),
    f"mtrec_jax.fit(events, {COLUMNS}, {TASKS}, settings={{'train.steps': 'many'}})": (
        "ConfigError",
        "train.steps: ",
    ),
    f"mtrec_jax.fit(events, {COLUMNS}, {TASKS}, settings={{'train.steps.x': 3}})": (
        "ConfigError",
        "train.steps",
    ),
    f"mtrec_jax.fit(None, {COLUMNS}, {TASKS})": ("DataError", "events: None; pass a pandas, Pola"),
    f"mtrec_jax.fit([1, 2], {COLUMNS}, {TASKS})": ("DataError", "pass pandas.DataFrame(events)"),
    f"mtrec_jax.fit('log.csv', {COLUMNS}, {TASKS})": ("DataError", "table 'events' (str) cannot b"),
    f"mtrec_jax.fit(events, {COLUMNS}, {TASKS}, items=7)": ("DataError", "table 'items' (int) can"),
    f"mtrec_jax.fit(events, user=7, item='i', time='t', {TASKS})": ("ConfigError", "data.user: "),
    f"mtrec_jax.fit(events, user='u', item='i', time=None, {TASKS})": (
        "ConfigError",
        "data.time: ",
    ),
    f"mtrec_jax.fit(events, {COLUMNS}, {TASKS}, title=7)": ("ConfigError", "data.title: "),
    f"mtrec_jax.fit(events, {COLUMNS}, {TASKS}, folder=7)": ("DataError", "folder: 7 is no path"),
    # kernels
    "mtrec_jax.cosine_scores([[1.0]], one)": (
        "DataError",
        "queries is a list; pass a NumPy or JAX array, e.g. np.asarray(queries)",
    ),
    "mtrec_jax.cosine_topk(one, [[1.0]], 1)": ("DataError", "items is a list; pass a NumPy or JAX"),
    "mtrec_jax.cosine_topk(pandas.DataFrame([[1.0]]), one, 1)": (
        "DataError",
        "queries is a DataFrame; pass a NumPy or JAX array",
    ),
    "mtrec_jax.cosine_topk(one, one, 1, exclude=[[0]])": ("DataError", "exclude is a list; pass a"),
    "mtrec_jax.cosine_topk(one, one, '1')": ("ConfigError", "k is '1'; it must be an integer"),
    "mtrec_jax.cosine_topk(one, one, 1.5)": ("ConfigError", "k is 1.5; it must be an integer"),
    "mtrec_jax.cosine_topk(one, one, 1, implementation=7)": (
        "ConfigError",
        "no implementation '7'",
    ),
    "mtrec_jax.target_rank(one, one, [0])": ("DataError", "targets is a list; pass a NumPy or JAX"),
    "mtrec_jax.target_rank(one, one, np.zeros(1, int), exclude=7)": (
        "DataError",
        "exclude is a int",
    ),
}
RIGHT = {  # {expression: its value}: what is understood although it is unusual
    "r.recommend(np.array(['u00001']), k=np.int64(2))['rank']": [1, 2],
    "r.recommend(pa.array(['u00001']), 1)['user']": ["u00001"],
    "r.recommend(pandas.Series(['u00001']), 1)['user']": ["u00001"],
    "r.recommend([b'u00001'], 1)['known']": [True],
    "len(r.recommend(['u00001'], 3, blocked=None))": 3,
    "[i in r.recommend(iter(['a']), 60, histories=[(i for i in ['i0001', 'i0002'])])['item']"
    " for i in ('i0001', 'i0002', 'i0003')]": [False, False, True],
    "mtrec_jax.load_experiment('shop', {'train.epochs': 3, 'model.width': '8'}).model.width": 8,
    "fitted({'train.steps': 3}).train.steps": 3,
    "fitted({'train.steps': 3}).train.epochs": 0,
    "fitted({'train.steps': '3'}).train.steps": 3,
    "fitted({'train': {'steps': 3}, 'train.seed': 5}).train.seed": 5,
    "fitted({'model': {'width': 8}, 'model.encoder.layers': 1}).model.width": 8,
    "fitted(None).train.epochs": 30,
}
SCRIPT = """
import json, sys
import numpy as np
import pandas
import pyarrow as pa
import mtrec_jax
from mtrec_jax.from_tables import experiment_of

r = mtrec_jax.Recommender(sys.argv[1])
events = pa.table({"u": [1, 1, 1], "i": [1, 2, 3], "t": [1, 2, 3]})
one = np.ones((1, 1), np.float32)

def fitted(settings):
    return experiment_of("u", "i", "t", {"a": "retrieval"}, "", None, settings)

answers = {}
for call in json.load(sys.stdin):
    try:
        answers[call] = ["", eval(call)]
        json.dumps(answers[call])
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        answers[call] = [type(error).__name__ if "Error" in kinds else "raw", str(error)]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(shop_run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[object]]:
    """{call: [class of its error or "", message or value]}."""
    folder: Path = tmp_path_factory.mktemp("calls")
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(shop_run.folder)],
        input=json.dumps([*CASES, *RIGHT]),
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert not list(folder.iterdir()), "a refused call has written something"
    return json.loads(ran.stdout.splitlines()[-1])


def test_wrong_arguments_are_explained(answers: dict[str, list[str]]) -> None:
    found = {call: answers[call] for call in CASES}
    for call, (_, message) in CASES.items():  # of a message, what is asked for is enough
        if message in str(found[call][1]):
            found[call] = [found[call][0], message]
    assert found == {call: [*expected] for call, expected in CASES.items()}


def test_what_can_be_understood_is_understood(answers: dict[str, list[object]]) -> None:
    assert {call: answers[call] for call in RIGHT} == {c: ["", v] for c, v in RIGHT.items()}
