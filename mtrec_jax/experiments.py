"""Experiments from TOML: overrides, choices among what is declared, and one check of the whole."""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from mtrec_jax import choices
from mtrec_jax.arguments import a_list, argument, shown
from mtrec_jax.config import (
    ANY,
    COLD_ITEMS,
    COLD_USERS,
    Bias,
    Experiment,
    Select,
    Task,
    Values,
    seen_behaviours,
    selection,
    table_of,
    to_dict,
)
from mtrec_jax.errors import ConfigError, nearest
from mtrec_jax.evaluation.metrics import metric_named, metrics_of
from mtrec_jax.losses.lists import LISTS
from mtrec_jax.losses.tasks import KINDS, labelled
from mtrec_jax.models.fusions.multiplicative import Multiplicative

# columns of the results and names of losses and orders, which a task of that name would overwrite
RESERVED = (
    *("user", "item", "title", "known", "rank", "row", "score", "new", "reason"),
    *("fused", "fusion", "chosen"),
)


def built_in_names() -> list[str]:
    """Names of the experiments that come with the package.

    >>> built_in_names()
    ['census-income', 'ml-100k', 'ml-1m', 'shop', 'shop-requests', 'shop-social']
    """
    folder = resources.files("mtrec_jax") / "configs"
    return sorted(
        f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")
    )


def load_experiment(
    config: str | Path,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    extensions: Iterable[type] = (),
    choose: bool = True,
) -> Experiment:
    """Read an experiment from a TOML file or a built-in name, then apply `key=value` overrides.

    Args:
      config: path of a TOML file, or one of `built_in_names()`.
      overrides: strings such as `"model.towers=ple"`; values are TOML, bare words are text. Or a
        mapping such as `{"model.towers": "ple"}`. A list of names as `tasks` or `features` chooses
        from what is declared, see `chosen`.
      extensions: classes of kinds of your own, which the configuration may then name.
      choose: False leaves such lists out: the whole, as it is prepared.

    Raises:
      ConfigError: no such file or name, invalid TOML, unknown key, wrong type or a combination
        that cannot work. The message names the key, the allowed values and the nearest spelling.

    >>> load_experiment("ml-1m", ["model.width=8", 'tasks=["like"]']).tasks.keys()
    dict_keys(['like'])
    """
    if not isinstance(config, (str, os.PathLike)):
        raise ConfigError(
            f"config: {shown(config)} is neither a path nor a name; name a TOML file or one of "
            f"{', '.join(built_in_names())}"
        )
    path = Path(config)
    if path.suffix == ".toml" or path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    elif str(config) in built_in_names():
        text = (resources.files("mtrec_jax") / "configs" / f"{config}.toml").read_text("utf-8")
    else:
        raise ConfigError(
            f"no configuration '{config}': it is neither a file nor one of "
            f"{', '.join(built_in_names())}.{nearest(str(config), built_in_names())}"
        )
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{config} is not valid TOML: {error}") from error
    if not isinstance(overrides, Mapping):
        overrides = dict(map(cut, a_list("overrides", overrides, ConfigError)))
    names: dict[str, Any] = {}
    for key, value in overrides.items():
        if key in ("tasks", "features") and not isinstance(value, Mapping):
            names[key] = value
        else:
            set_key(values, key, value)
    experiment = _read(values, str(config), extensions)
    check(experiment, trained=not names)  # the model need only suit what is chosen
    return chosen(experiment, **names) if choose and names else experiment


def parse_experiment(
    values: Mapping[str, Any], where: str = "configuration", extensions: Iterable[type] = ()
) -> Experiment:
    """Check nested dicts against the types of `config` and return the frozen experiment.

    Raises:
      ConfigError: as `load_experiment`; `where` opens the message.
    """
    experiment = _read(values, where, extensions)
    check(experiment)
    return experiment


def _read(values: Mapping[str, Any], where: str, extensions: Iterable[type]) -> Experiment:
    if not isinstance(values, Mapping):
        kind = type(values).__name__
        raise ConfigError(f"{where}: {shown(values)} is a {kind}, not a mapping of sections")
    data, clean = (values.get(key, {}) for key in ("data", "clean"))
    tables = isinstance(data, Mapping) and isinstance(clean, Mapping)
    # equal rows without a user are different cases, equal events of a user one written twice
    if tables and not data.get("user") and not clean.get("duplicate_columns"):
        values = {**values, "clean": {"duplicates": "keep", **clean}}
    found: Experiment = choices.read(Experiment, values, where, extensions)
    return found


def cut(override: str, given: str = "overrides") -> tuple[str, Any]:
    """Key and value of an override such as "model.towers=ple"; the value is TOML, or else a text.
    `given` is the argument that it came by.

    Raises:
      ConfigError: it is no text with an equals sign.

    >>> cut("model.width=8"), cut("model.towers=ple")
    (('model.width', 8), ('model.towers', 'ple'))
    """
    key, equals, text = override.partition("=") if isinstance(override, str) else ("", "", "")
    if not equals:
        example = "model.width=8..64" if given == "ranges" else "model.towers=ple"
        raise ConfigError(f"{argument(given)} {override}: write it as key=value, e.g. {example}")
    try:
        return key.strip(), tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), text.strip()  # a bare word is text


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of nested tables; a kind alone becomes a table with that kind.

    Raises:
      ConfigError: the key is none, or leads through something that is no table.

    >>> values = {"model": {"towers": "ple"}}
    >>> set_key(values, "model.towers.levels", 3)
    >>> values
    {'model': {'towers': {'kind': 'ple', 'levels': 3}}}
    """
    parts = key.split(".") if isinstance(key, str) else [""]
    if not all(parts):
        raise ConfigError(
            f"{argument('overrides')} {key}: write it as key=value, e.g. model.towers=ple"
        )
    node: Any = values
    for depth, part in enumerate(parts[:-1]):
        if isinstance(node, dict) and (depth or part != "name") and part in node:
            node[part] = choices.kind_alone(node[part])
        node = node.setdefault(part, {}) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise ConfigError(f"{argument('overrides')} {key}: '{'.'.join(parts[:-1])}' is not a table")
    node[parts[-1]] = value


def overridden(experiment: Experiment, settings: Mapping[str, Any]) -> Experiment:
    """An experiment with some keys set anew. A kind that is declared keeps its declared options.

    Raises:
      ConfigError: as `load_experiment`.

    >>> shop = load_experiment("shop")
    >>> overridden(shop, {"model.towers": "mmoe", "train.seed": 3}).model.towers.experts
    3
    >>> overridden(shop, {"model.towers": "ple"}).model.towers.kind
    'ple'
    """
    e, values = experiment, to_dict(experiment)
    for key, value in settings.items():
        there: Any = values
        for part in key.split("."):
            there = there.get(part) if isinstance(there, dict) else None
        if not isinstance(there, dict) or there.get("kind") != value:
            set_key(values, key, value)
    kinds = dict.fromkeys(choices.chosen_kinds(e))
    own = [kind for kind in kinds if not kind.__module__.startswith("mtrec_jax.")]
    return parse_experiment(values, f"experiment '{e.name}'", own)


def chosen(experiment: Experiment, tasks: Any = None, features: Any = None) -> Experiment:
    """An experiment on some of the declared tasks and features, over the same prepared data.

    What names a task or feature that is not chosen falls away: `select.metric`, parts of
    `model.fusion_objective` and `model.fusion.powers`, tables, and the sample space of a task,
    which its labels have already.

    Args:
      experiment: what is declared.
      tasks, features: lists of names, also as one text with commas; None: all.

    Raises:
      ConfigError: a name is not declared, or nothing is left to train.
    """
    e, problems = experiment, []
    kept: dict[str, list[str]] = {}
    for section, names in (("tasks", tasks), ("features", features)):
        declared = getattr(e, section)
        names = names.split(",") if isinstance(names, str) else names
        wanted = declared if names is None else a_list(section, names, ConfigError)
        wanted = [name.strip() if isinstance(name, str) else name for name in wanted]
        problems += [
            f"{section}: {shown(name)} is not declared.{nearest(str(name), declared)}"
            for name in wanted
            if name not in declared
        ]
        kept[section] = [name for name in declared if name in wanted]
    if problems:
        raise ConfigError(f"experiment '{e.name}':\n" + "\n".join(f"  {p}" for p in problems))

    def known(name: str) -> str:
        return name if name in kept["tasks"] else ""

    seen = seen_behaviours(e) if any(e.tasks[n].kind == "retrieval" for n in kept["tasks"]) else ()
    worths = {n: worth for n, worth in e.model.fusion_objective.items() if known(n)}
    named = e.select.metric
    listed = (named,) if isinstance(named, str) else tuple(named)
    left = tuple(name for name in listed if known(name.partition("/")[0]))
    select = Select(metric=left if left and not isinstance(named, str) else "".join(left))
    if left and isinstance(named, dict):
        select = Select(metric={name: named[name] for name in left})
    found = dataclasses.replace(
        e,
        left_out=(*e.left_out, *(n for n in e.tasks if not known(n))),
        tasks={
            n: dataclasses.replace(t, where=known(t.where)) for n, t in e.tasks.items() if known(n)
        },
        features={name: e.features[name] for name in kept["features"]},
        tables={n: table for n, table in e.tables.items() if n in ("item", *kept["features"])},
        # what makes items seen is not to change with the tasks that are trained
        evaluate=dataclasses.replace(
            e.evaluate,
            seen=seen or e.evaluate.seen,
            segments=tuple(
                n for n in e.evaluate.segments if n in (COLD_USERS, COLD_ITEMS, *kept["features"])
            ),
        ),
        guard=dataclasses.replace(
            e.guard,
            allow=tuple(p for p in e.guard.allow if p.partition("/")[0] in kept["features"]),
        ),
        model=dataclasses.replace(
            e.model,
            fusion=_chosen_fusion(e.model.fusion, kept["tasks"]),
            fusion_objective=worths if any(worths.values()) else {},
            bias=_chosen_bias(e.model.bias, kept),
        ),
        select=select,
        published=tuple(figure for figure in e.published if known(figure.task)),
    )
    check(found)
    return found


def _chosen_fusion(fusion: Any, tasks: Sequence[str]) -> Any:
    """The fusion with the powers of these tasks; without any that is above 0 they are learned."""
    if not isinstance(fusion, Multiplicative):
        return fusion
    powers = {name: power for name, power in fusion.powers.items() if name in tasks}
    return dataclasses.replace(fusion, powers=powers if any(powers.values()) else {})


def _chosen_bias(bias: Bias | None, kept: Mapping[str, list[str]]) -> Bias | None:
    """What is left of the bias with these features and tasks; None: nothing to explain, or by."""
    if bias is None:
        return None
    features, tasks = (
        tuple(name for name in getattr(bias, section) if name in kept[section])
        for section in ("features", "tasks")
    )
    if not features or (bias.tasks and not tasks):
        return None
    return dataclasses.replace(bias, features=features, tasks=tasks)


def check(experiment: Experiment, trained: bool = True) -> None:
    """Raise `ConfigError` for combinations that types alone cannot forbid.

    `trained=False` leaves out what concerns the model: tasks and features are still to be chosen.
    """
    e = experiment
    problems = [
        *_names(e), *_data(e), *_clean(e), *_split(e), *_features(e), *_tables(e), *_tasks(e),
        *(_model(e) if trained else ()),
    ]  # fmt: skip
    if trained and not problems:
        problems += _selection(e)
    if problems:
        raise ConfigError(f"experiment '{e.name}':\n" + "\n".join(f"  {p}" for p in problems))


def _names(e: Experiment) -> Iterator[str]:
    if not re.fullmatch(r"[\w-][\w. -]*", e.name):
        yield f"name: '{e.name}' names folders; use letters, digits, '_', '-' and '.'"
    sections: dict[str, Mapping[str, Any]] = {
        "features": e.features,
        "tasks": e.tasks,
        "clean.values": e.clean.values,
    }
    for key, names in sections.items():
        lower = [name.lower() for name in names]
        for name in names:
            if key != "clean.values" and not re.fullmatch(r"[\w-][\w.-]*", name):
                yield (
                    f"{key}: '{name}' names a file or column; use letters, digits, '_', '-' and "
                    "'.' only"
                )
            if lower.count(name.lower()) > 1:
                yield f"{key}: '{name}' occurs twice (upper and lower case are the same)"
    if not e.tasks:
        yield "tasks: at least one is needed, e.g. [tasks.next_item] kind = 'retrieval'"
    for name in e.tasks:
        if name in RESERVED:
            column = e.tasks[name].column or name
            yield (
                f"tasks.{name}: the results use this name themselves; rename the task and set "
                f"column = '{column}'"
            )
    if "item" in e.features:
        yield "features.item: the items' own rows have this name; rename the feature"


def _data(e: Experiment) -> Iterator[str]:
    data = e.data
    if data.length and data.positions > data.length:
        yield "data.positions: at most data.history_length"
    if data.queries is not None and not (data.user and data.time):
        yield "data.queries: needs data.user and data.time"
    if data.hide_ties and not data.time:
        yield "data.hide_ties: needs data.time"
    if not data.length and not data.item and not e.features:
        yield "features: one is needed with on = 'request'; without, all rows look alike"


def _clean(e: Experiment) -> Iterator[str]:
    """Rules that say too little, or two things at once."""
    clean, data = e.clean, e.data
    needs = {
        "min_user_events": (clean.min_user_events > 1, ("user",)),
        "min_item_events": (clean.min_item_events > 1, ("item",)),
        "max_user_events_a_day": (clean.max_user_events_a_day, ("user", "time")),
        "earliest": (clean.earliest, ("time",)),
        "latest": (clean.latest, ("time",)),
    }
    for key, (asked, columns) in needs.items():
        if asked and (absent := [f"data.{c}" for c in columns if not getattr(data, c)]):
            yield f"clean.{key}: needs {' and '.join(absent)}"
    for name, rule in clean.values.items():
        yield from (f"clean.values.{name}{problem}" for problem in _values(rule))


def _values(rule: Values) -> Iterator[str]:
    limits = [bound for bound in (rule.low, rule.high) if bound is not None]
    if rule.valid and (limits or rule.bounds != "given"):
        yield ": valid, or low, high and bounds, not both; make two rules"
    if not rule.column and (not rule.valid or rule.action == "missing"):
        yield ".column: needed, the column whose values are judged"
    if rule.valid:
        return
    if rule.bounds != "mad" and not limits:
        yield ": give low, high or both"
    if rule.bounds == "mad" and limits:
        yield ": bounds = 'mad' takes deviations, neither low nor high"
    if rule.bounds == "quantiles" and not all(0 <= bound <= 1 for bound in limits):
        yield ": low and high are shares between 0 and 1, such as 0.01"
    if len(limits) == 2 and limits[0] > limits[1]:
        yield ": low is above high"


def _split(e: Experiment) -> Iterator[str]:
    split = e.split
    needed = {"time": "time", "cold_item": "item"}
    needed |= dict.fromkeys(("leave_one_out", "user_ratio", "user_holdout", "cold_user"), "user")
    key = needed.get(split.kind, "")
    if key and not getattr(e.data, key):
        yield (
            f"split.kind: '{split.kind}' needs data.{key}; 'random', 'folds' and 'files' are the "
            "ones that do without"
        )
    for key in ("validation_files", "test_files"):
        if getattr(split, key) and split.kind != "files":
            yield f"split.{key}: for split.kind = 'files'; remove it, or set that kind"
    if split.kind == "files" and not split.test_files:
        yield "split.test_files: needed when split.kind = 'files'"
    by_number = ("leave_one_out", "folds", "files")
    if split.validation + split.test >= 1 and split.kind not in by_number:
        yield "split.validation, split.test: together below 1, so that some train"
    if split.kind in ("leave_one_out", "folds") and not split.validation and split.test:
        yield (
            f"split.validation: 0 with split.kind = '{split.kind}', which holds back no shares; "
            "set split.test = 0 as well, so that every event trains, or neither"
        )
    yield from _folds(e)


def _folds(e: Experiment) -> Iterator[str]:
    split = e.split
    if split.kind != "folds":
        for key in ("by", "stratify", "hold_back"):
            if getattr(split, key) is not None:
                yield f"split.{key}: for split.kind = 'folds'; remove it, or set that kind"
        return
    if split.folds < 3 and not split.hold_back and split.by != "time":
        yield (
            "split.folds: 3 or more: one tests, one validates, the others train; or set "
            "split.hold_back, the share of the others that validates"
        )
    if split.by and not getattr(e.data, split.by):
        yield f"split.by: '{split.by}' needs data.{split.by}"
    if split.by and split.stratify:
        yield "split.stratify: of folds of events; remove it, or split.by"
    binary = [name for name, task in e.tasks.items() if task.kind == "binary"]
    if split.stratify and split.stratify not in (*binary, *e.left_out):
        hint = nearest(split.stratify, binary)
        yield f"split.stratify: '{split.stratify}' is no binary task.{hint}"
    if split.fold >= split.folds:
        yield f"split.fold: between 0 and {split.folds - 1}, not {split.fold}"


def _features(e: Experiment) -> Iterator[str]:
    labels = {t.column or n: n for n, t in e.tasks.items() if t.kind != "retrieval"}
    labels |= {t.reference: n for n, t in e.tasks.items() if t.reference}
    numbers = [n for n, t in e.tasks.items() if t.kind in labelled("numbers", "levels")]
    for name, feature in e.features.items():
        yield from (f"features.{name}{problem}" for problem in feature.problems(name, e.data))
        label, column = getattr(feature, "label", None), feature.column or name
        if label is not None and label not in (*numbers, *e.left_out):
            hint = nearest(label, numbers)
            yield f"features.{name}.label: '{label}' is no binary or regression task.{hint}"
        if feature.on != "history" and column in labels and not feature.computed:
            yield (
                f"features.{name}: column '{column}' is the label of task '{labels[column]}'; a "
                "label among the features leaks the answer. Remove the feature, or declare it "
                "on = 'history', where only past events show it"
            )
    for pair in e.guard.allow:
        name = pair.partition("/")[0]
        if name not in e.features:
            hint = nearest(name, e.features)
            yield (
                f"guard.allow: '{pair}' is neither a feature here nor 'feature/task' of one.{hint}"
            )


def _tables(e: Experiment) -> Iterator[str]:
    tables = {n: f for n, f in e.features.items() if f.fitted and not f.gives_numbers}
    for name, table in e.tables.items():
        key, resolved = f"tables.{name}", table_of(e, name)
        if name in e.features and name not in tables:
            yield f"{key}: '{e.features[name].kind}' gives no ids to look up; remove it"
        elif name not in tables and (name != "item" or not e.data.item):
            known = ["item"] * bool(e.data.item) + list(tables)
            yield f"{key}: no such table; there are {', '.join(known)}.{nearest(name, known)}"
        if table.rule and resolved.update == "dense":
            yield f"{key}.rule: of row by row updates; set update = 'sparse', or remove it"
        if table.capacity and name in tables and not tables[name].grows:
            yield f"{key}.capacity: the values of kind '{tables[name].kind}' do not grow; remove it"
        if table.capacity and table.hash_rows:
            yield f"{key}.capacity: hash_rows has room for any number of values; remove one of them"
        if 0 < table.hash_rows < table.hash_functions:
            yield f"{key}.hash_functions: at most hash_rows"


def _tasks(e: Experiment) -> Iterator[str]:
    binary = [n for n, t in e.tasks.items() if t.kind == "binary"]
    for name, task in e.tasks.items():
        key, seen, where = f"tasks.{name}", {name}, task.where
        if task.reference and task.kind not in labelled("numbers", "levels"):
            kinds = ", ".join(labelled("numbers", "levels"))
            yield f"{key}.reference: for tasks of kind {kinds}; remove it"
        yield from (f"{key}{problem}" for problem in _loss(e, task))
        if where and where not in binary:
            yield f"{key}.where: '{where}' is no binary task.{nearest(where, binary)}"
        while where in e.tasks and where not in seen:
            seen.add(where)
            where = e.tasks[where].where
        if where in seen:
            yield f"{key}.where: the sample spaces run in a circle"
        if task.at_least is not None and task.equals is not None:
            yield f"{key}: at_least or equals, not both"
        if task.kind == "retrieval" and not e.data.item:
            yield f"{key}.kind: 'retrieval' needs data.item"
        if task.kind != "binary" and (task.at_least is not None or task.equals is not None):
            yield f"{key}: at_least and equals are for binary tasks"
    if sum(t.kind == "retrieval" for t in e.tasks.values()) > 1:
        yield "tasks: one retrieval task at most"


def _loss(e: Experiment, task: Task) -> Iterator[str]:
    """What the loss of a task asks for."""
    kind, listed = KINDS.get(task.kind), task.loss in LISTS
    known = [*kind.heads, *kind.lists] if kind else []
    if task.loss and task.loss not in known:
        has = f"has {', '.join(known)}" if known else "has one loss, which is not chosen"
        yield f".loss: '{task.loss}' is none of kind '{task.kind}', which {has}"
    elif listed and (e.data.length < 2 or e.data.positions == 1):
        yield (
            f".loss: '{task.loss}' is over lists of a user's impressions, and a training example "
            "has one position here. It needs data.user, data.item and data.history_length above "
            "1, and data.positions other than 1; or set it to 'pointwise'"
        )
    if not listed and (task.pointwise or task.lists != "user"):
        yield ".pointwise, .lists: of loss = 'pairwise' or 'listwise'; remove them"
    if task.lists == "request" and (not e.data.hide_ties or e.data.queries is not None):
        yield (
            ".lists: 'request' puts together what a user was shown at one time, which is told by "
            "data.hide_ties = true, without data.queries; set these so, or lists = 'user'"
        )
    if task.loss == "duration_quantiles" and not task.duration:
        yield ".duration: needed by loss = 'duration_quantiles', a feature of the items"
    if task.duration:
        yield from (f".duration: {problem}" for problem in _duration(e, task))


def _duration(e: Experiment, task: Task) -> Iterator[str]:
    """Why a feature is no group of durations."""
    feature = e.features.get(task.duration)
    if task.kind != "watch_time":
        yield "for tasks of kind 'watch_time'; remove it"
    elif feature is None:
        yield f"there is no feature '{task.duration}'.{nearest(task.duration, e.features)}"
    elif feature.on != "item" or feature.gives_numbers or hasattr(feature, "max_values"):
        yield (
            f"'{task.duration}' does not put each item in one group; name a feature with "
            "on = 'item' and kind = 'binned'"
        )


def _model(e: Experiment) -> Iterator[str]:
    inputs = [feature.on for feature in e.features.values()]
    is_read = e.model.encoder.kind != "none"
    if not is_read and "history" in inputs:
        names = ", ".join(n for n, f in e.features.items() if f.on == "history")
        yield (
            f"model.encoder: with 'none' nothing would read the history ({names}); remove these "
            "features, or use 'transformer'"
        )
    elif not is_read and e.data.length and not {"context", "request"} & set(inputs):
        yield (
            "model.encoder: with 'none' and no feature on = 'context' or 'request' every user "
            "would be the same; add such a feature, or use 'transformer'"
        )
    elif (
        any(task.kind == "retrieval" for task in e.tasks.values())
        and not (is_read and e.data.length)
        and "context" not in inputs
    ):
        yield (
            "tasks: retrieval asks by what is known of a user, and nothing is: there is no history "
            "(data.user, data.history_length) and no feature on = 'context'; add one, or leave the "
            "task out (tasks = [...])"
        )
    heads = getattr(e.model.encoder, "heads", 1)
    if e.model.width % heads:
        yield f"model.width: {e.model.width} is no multiple of model.encoder.heads = {heads}"
    if hasattr(e.model.encoder, "share") and e.data.hide_ties:
        yield (
            f"data.hide_ties: kind '{e.model.encoder.kind}' of model.encoder hides single events, "
            "and would see the other one of the same time; set it to false, or use 'transformer'"
        )
    yield from _past(e)
    yield from _moments(e)
    yield from _bias(e)
    worths = e.model.fusion_objective
    for name in worths:
        key = f"model.fusion_objective.{name}"
        if name not in e.tasks:
            yield f"{key}: there is no such task.{nearest(name, e.tasks)}"
        elif e.tasks[name].kind not in ("retrieval", "binary"):
            yield f"{key}: a retrieval or binary task is needed"
    if worths and not any(worths.values()):
        yield "model.fusion_objective: at least one worth must be above 0"
    yield from _segments(e)
    yield from _train(e)


def _past(e: Experiment) -> Iterator[str]:
    """Options that ask an encoder for states of a history."""
    reads_past = (
        e.model.encoder.kind != "none" and e.data.length and not hasattr(e.model.encoder, "share")
    )
    if e.model.interests > 1 and not reads_past:
        yield (
            f"model.interests: {e.model.interests}, which are running sums over the history; kind "
            f"'{e.model.encoder.kind}' of model.encoder has no states to add them to here; set it "
            "to 1, or use 'transformer' and a history"
        )
    if e.train.contrast and not reads_past:
        yield (
            "train.contrast: it compares what an encoder makes of altered histories, and kind "
            f"'{e.model.encoder.kind}' of model.encoder makes nothing of them here; remove it, or "
            "use 'transformer' and a history"
        )
    elif e.train.contrast and e.train.accumulate > 1:
        yield (
            f"train.contrast: it compares the users of a batch with each other, and "
            f"train.accumulate = {e.train.accumulate} takes them in parts; keep one of the two"
        )
    elif e.train.contrast and not e.train.contrast.ways:
        yield "train.contrast: crop, mask, reorder and drop are all 0; keep one, or remove it"


def _moments(e: Experiment) -> Iterator[str]:
    """Times that encoders compare: one of the events, and one of the query."""
    moments = {n: f.on for n, f in e.features.items() if not f.looked_up}
    of_events, of_query = (
        [n for n, on in moments.items() if on == side] for side in ("history", "request")
    )
    for names in (of_events, of_query):
        if len(names) > 1:
            yield f"features: {' and '.join(names)} are both of kind 'moment'; keep one"
    if of_query and not (of_events and hasattr(e.model.encoder, "compares_times")):
        yield (
            f"features.{of_query[0]}: the time of the query is compared with those of events by "
            "encoders of kind 'hstu', with a feature of kind 'moment' on = 'history'; have both, "
            "or leave it out"
        )


def without_effect(experiment: Experiment) -> list[str]:
    """What is set, may stand there for another encoder or other tasks, and changes nothing here.

    >>> e = load_experiment("shop", {"train.negatives": "popular", "tasks": ["click"]})
    >>> without_effect(e)
    ['no effect, as no task is a retrieval: train.negatives']
    """
    e, found = experiment, []
    moments = [n for n, f in e.features.items() if not f.looked_up and f.on == "history"]
    if moments and not hasattr(e.model.encoder, "compares_times"):
        found.append(
            f"features.{moments[0]} has no effect: model.encoder = '{e.model.encoder.kind}' does "
            "not compare times of events, as 'hstu' does"
        )
    if not any(task.kind == "retrieval" for task in e.tasks.values()):
        changed = {
            "train.retrieval": e.train.retrieval.kind != "softmax",
            "train.negatives": e.train.negatives.kind != "uniform",
            "train.contrast": e.train.contrast is not None,
        }
        lost = ", ".join(name for name in changed if changed[name])
        if lost:
            found.append(f"no effect, as no task is a retrieval: {lost}")
    return found


def _segments(e: Experiment) -> Iterator[str]:
    """What targets cannot be told apart by."""
    usable = [n for n, f in e.features.items() if f.fitted and not f.gives_numbers]
    usable = [n for n in usable if e.features[n].on != "history"]
    usable += [COLD_USERS] * bool(e.data.user) + [COLD_ITEMS] * bool(e.data.item)
    for name in e.evaluate.segments:
        if name not in usable:
            yield (
                f"evaluate.segments: '{name}' is none of {', '.join(usable)}: features of the "
                "context, the request or the item that have values, as 'binned' ones of numbers "
                f"do.{nearest(name, usable)}"
            )


def _bias(e: Experiment) -> Iterator[str]:
    if e.model.bias is None:
        return
    inputs = {name: feature for name, feature in e.features.items() if feature.fitted}
    moments = [name for name, feature in inputs.items() if feature.on == "request"]
    taught = [name for name, task in e.tasks.items() if task.kind != "retrieval"]
    for name in e.model.bias.features:
        if name not in moments:
            hint = nearest(name, moments)
            yield f"model.bias.features: '{name}' is no feature on = 'request'.{hint}"
    for name in e.model.bias.tasks:
        if name not in taught:
            hint = nearest(name, taught)
            yield f"model.bias.tasks: '{name}' is no task with a tower (all but retrieval).{hint}"
    if not taught:
        yield "model.bias: a retrieval task alone has no tower to correct; remove it"


def _train(e: Experiment) -> Iterator[str]:
    """Lengths, and decays that their optimizer does not know."""
    train = e.train
    if (train.epochs > 0) == (train.steps > 0):
        yield "train.epochs, train.steps: exactly one must be above 0"
    if train.weight_decay and train.optimizer != "adamw":
        yield (
            f"train.weight_decay: '{train.optimizer}' does not decay; set train.optimizer = "
            "'adamw', or remove it"
        )
    names = ["item"] * bool(e.data.item) + list(e.features)
    tables = [table for table in (table_of(e, n) for n in names) if table.update == "sparse"]
    if train.row_weight_decay and any(table.rule == "ftrl" for table in tables):
        yield (
            "train.row_weight_decay: 'ftrl' computes rows from all their gradients anew, so that "
            "nothing decays; take another row_optimizer or rule, or remove it"
        )
    if train.length_buckets > max(1, e.data.length):
        yield (
            f"train.length_buckets: {train.length_buckets} for histories of {e.data.length}; at "
            "most one shape a place, and without histories 1"
        )
    yield from _shown_too(e)
    batches = getattr(train.negatives, "batches", 1)
    if getattr(train.negatives, "count", 0) % batches:
        yield (
            f"train.negatives.count: {train.negatives.count} is no multiple of "
            f"train.negatives.batches = {batches}, each of which brings an equal part"
        )
    if e.model.learn_temperature and not getattr(train.retrieval, "has_temperature", True):
        yield (
            f"model.learn_temperature: a loss of kind '{train.retrieval.kind}' has no temperature; "
            "set it to false, or take another train.retrieval"
        )
    if not e.split.validates:
        yield from _unjudged(e)


def _shown_too(e: Experiment) -> Iterator[str]:
    """What tells the events that were shown and passed over."""
    shown, key = getattr(e.train.retrieval, "shown", ""), "train.retrieval.shown"
    retrieval = [(name, task) for name, task in e.tasks.items() if task.kind == "retrieval"]
    if not shown or not retrieval:
        return
    name, task = retrieval[0]
    if not task.where and e.left_out:
        yield (
            f"{key}: what was passed over has a 0 in the binary task that tasks.{name}.where "
            "names, and without it nothing was; choose this task too, if there is one, or remove "
            "the option"
        )
    elif not task.where:
        yield (
            f"{key}: every event is one that the retrieval is to find, so nothing was passed over; "
            f"set tasks.{name}.where to a binary task, such as 'click'"
        )
    if hasattr(e.model.encoder, "share"):
        yield (
            f"{key}: kind '{e.model.encoder.kind}' of model.encoder learns hidden events alone, "
            "and hardly any of them was passed over; remove the option, or use 'transformer'"
        )
    if shown == "request" and not e.data.hide_ties:
        yield f"{key}: 'request' needs data.hide_ties = true; or take 'user'"


def _unjudged(e: Experiment) -> Iterator[str]:
    """What a training without validation events has no use for."""
    why = "there are no validation events (split.validation = 0) to judge by, and the last step is "
    why += "kept as the best one"
    if e.train.patience:
        yield f"train.patience: {why}; set it to 0"
    if e.train.evaluate_every:
        yield f"train.evaluate_every: {why}; set it to 0, and train.checkpoint_every instead"
    if e.select.metric:
        yield f"select.metric: {why}; remove it"


def _selection(e: Experiment) -> Iterator[str]:
    chosen_by, has_users = selection(e), bool(e.data.user)
    for name, metric in chosen_by.metrics:
        if name not in e.tasks:
            yield f"select.metric: there is no task '{name}'.{nearest(name, e.tasks)}"
        elif metric not in (known := metrics_of(e.tasks[name].kind, e.evaluate.ks, has_users)):
            yield f"select.metric: task '{name}' has {', '.join(known)}, not '{metric}'"
        elif metric_named(metric).ideal is not None:
            yield (
                f"select.metric: {name}/{metric} is best at {metric_named(metric).ideal:g}, "
                "neither as large nor as low as can be; choose by another metric"
            )
        elif chosen_by.weights:
            weight = chosen_by.weights[chosen_by.metrics.index((name, metric))]
            if not weight or (weight > 0) != metric_named(metric).larger_is_better:
                wanted = "above" if metric_named(metric).larger_is_better else "below"
                yield (
                    f"select.metric: {name}/{metric} needs a weight {wanted} 0, not {weight:g}: "
                    "the largest sum is chosen"
                )
        elif metric_named(metric).larger_is_better != chosen_by.larger:
            yield (
                f"select.metric: {name}/{metric} is better when "
                f"{'lower' if chosen_by.larger else 'larger'}, unlike the first of the list, so "
                "that their mean means nothing; name metrics of one direction, or give weights"
            )
    binary = [name for name, task in e.tasks.items() if task.kind == "binary"]
    for number, baseline in enumerate(e.evaluate.baselines):
        if getattr(baseline, "days", 0) and not e.data.time:
            yield (
                f"evaluate.baselines.{number}: {baseline.days:g} days of what has no time; set "
                "data.time, or remove days"
            )
    if e.evaluate.targets == "last" and not has_users:
        yield "evaluate.targets: 'last' is of each user, but data.user is not set; set it, or 'all'"
    for name in e.evaluate.seen if e.evaluate.seen != (ANY,) else ():
        if name not in (*binary, *e.left_out):
            hint = nearest(name, binary)
            yield f"evaluate.seen: '{name}' is no binary task; or say [\"{ANY}\"].{hint}"
