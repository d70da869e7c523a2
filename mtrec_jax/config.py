"""Frozen, typed configuration: what an experiment may say, and what follows from it.

An `Experiment` is plain data. Nothing in it is evaluated as code, and the resolved experiment is
stored with the run, so that a run folder says everything about how it came to be. How it is read
from TOML and checked is in `experiments`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
import tomli_w
from pydantic import BeforeValidator, Field

from mtrec_jax.balance import BALANCERS
from mtrec_jax.balance.static import Static
from mtrec_jax.baselines import BASELINES
from mtrec_jax.choices import Choice, kind_alone
from mtrec_jax.data.features import CHOICE, Feature
from mtrec_jax.diversity import DIVERSIFIERS
from mtrec_jax.evaluation.metrics import METRICS, metric_named
from mtrec_jax.losses.negatives import NEGATIVES
from mtrec_jax.losses.negatives.catalogue import Uniform
from mtrec_jax.losses.retrieval import RETRIEVAL
from mtrec_jax.losses.retrieval.softmax import Softmax
from mtrec_jax.models.encoders import ENCODERS
from mtrec_jax.models.encoders.transformer import Transformer
from mtrec_jax.models.fusions import FUSIONS, Term, Utility
from mtrec_jax.models.fusions.weighted import Weighted
from mtrec_jax.models.interactions import INTERACTIONS
from mtrec_jax.models.interactions.none import NoInteraction
from mtrec_jax.models.layers import MaybeHidden
from mtrec_jax.models.numbers import NUMBERS
from mtrec_jax.models.numbers.plain import PlainNumbers
from mtrec_jax.models.towers import TOWERS
from mtrec_jax.models.towers.mmoe import MMoE
from mtrec_jax.models.views import Contrast

_STRICT = pydantic.ConfigDict(extra="forbid", strict=False, allow_inf_nan=False)
_ALONE = BeforeValidator(kind_alone)  # its kind alone will do
Natural = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Part = Annotated[float, Field(gt=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Worth = Annotated[float, Field(ge=0)]
ANY = "any"  # of `evaluate.seen`: every event
COLD_USERS, COLD_ITEMS = "cold_users", "cold_items"  # of `evaluate.segments`: new to training
Sizes = Annotated[tuple[Count, ...], Field(min_length=1)]
Metrics = Annotated[tuple[str, ...], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class Files:
    """One raw table: files of one format that are read one after the other."""

    __pydantic_config__ = _STRICT
    files: tuple[str, ...] = ()  # paths or globs in the data folder, or URLs such as s3://…/*.csv
    format: Literal["csv", "tsv", "jsonl", "parquet", "atomic"] = "csv"  # .gz, .zst are unpacked
    separator: str = ""  # "": a comma, or a tab for tsv and atomic
    header: tuple[str, ...] = ()  # column names, when the files have no header line
    rename: dict[str, str] = field(default_factory=dict)  # {name in the file: name used here}


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the raw data is and what its columns mean."""

    __pydantic_config__ = _STRICT
    public: str = ""  # what `mtrec data` fetches or generates for this experiment
    events: Files = field(default_factory=Files)
    items: Files | None = None
    users: Files | None = None
    queries: Files | None = None  # searches: user, time and text; they show in the user's history
    ties: Files | None = None  # user-user ties, a pair a row
    derive: dict[str, str] = field(default_factory=dict)  # {new column of the events: expression}
    user: str = ""  # column names, each of them optional; tables of users and items use the same
    item: str = ""
    time: str = ""  # "": events happened in the order of the source
    time_unit: Literal["s", "ms", "us"] = "s"  # of times that are numbers
    query: str = "query"  # column of the queries: what was searched for
    friend: str = "friend"  # column of the ties: the other user
    title: str = ""  # column of the item table that people would like to read
    history_length: Natural = 50  # L: events a position looks back on; 0, no user or item: none
    past: Literal["rolling", "frozen"] = "rolling"  # what judged events know: all before, or as of
    # the split: validation training events, test those of training and validation
    positions: Natural = 0  # P: targets per training example; 0 means history_length
    hide_ties: bool = False  # True: a position does not see events of its own timestamp
    seed: Natural = 0  # order of the training examples on disk
    reference: str = "reference"  # what the tables call the tasks' reference columns

    @property
    def length(self) -> int:
        """L: events that a position looks back on; 0 where there are no users or no items."""
        return self.history_length if self.user and self.item else 0


@dataclass(frozen=True, kw_only=True)
class Values:
    """One rule about the values of an event: what is not possible, or too far out.

    Either `valid`, an expression that a good row fulfils, or the bounds of one numeric `column`:
    given (`low`, `high`), as quantiles of the training rows (`low`, `high` are shares), or so many
    median absolute deviations (`deviations`) around the median of the training rows. A missing
    value breaks no rule.
    """

    __pydantic_config__ = _STRICT
    valid: str = ""
    column: str = ""
    bounds: Literal["given", "quantiles", "mad"] = "given"
    low: float | None = None
    high: float | None = None
    deviations: Positive = 5.0  # mad: 1.4826 * MAD is the standard deviation of a normal value
    action: Literal["remove", "missing"] = "remove"  # the row, or only the value of `column`


@dataclass(frozen=True, kw_only=True)
class Clean:
    """What is removed before anything else happens; every rule is counted in the report."""

    __pydantic_config__ = _STRICT
    duplicates: Literal["drop", "keep"] = "drop"  # equal rows; "keep" without data.user
    duplicate_columns: tuple[str, ...] = ()  # rows are equal in these; (): in every column
    values: dict[str, Values] = field(default_factory=dict)  # {name in the report: rule}
    earliest: str = ""  # times before it are removed: seconds or ISO 8601
    latest: str = ""  # times after it are removed; "now": what lies in the future
    max_user_events_a_day: Natural = 0  # users with more on any day (UTC) are bots; 0: nobody is
    min_user_events: Natural = 0  # k-core: repeated until both hold
    min_item_events: Natural = 0
    max_bad_fraction: Amount = 0.01  # more malformed rows than this stop the preparation


SplitKind = Literal[
    "leave_one_out",  # each user's last event tests, the one before validates
    "time",  # two points in time
    "user_ratio",  # the last events of each user, by fractions
    "random",  # events, by integer arithmetic on their source row
    "folds",  # k folds of events: fold `fold` tests, the next one validates
    "user_holdout",  # held-out users: first events are shown (fold-in), later ones judge
    "cold_user",  # all events of held-out users judge
    "cold_item",  # all events of held-out items judge
    "files",  # given files
]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which rows train, which choose, which judge."""

    __pydantic_config__ = _STRICT
    kind: SplitKind = "leave_one_out"
    validation: Fraction = 0.1  # of the events, users or items (files: of the training files)
    test: Fraction = 0.1
    folds: Count = 5
    fold: Natural = 0  # 0 .. folds - 1
    by: Literal["user", "time"] | None = None  # folds: of whole users, or windows of time
    stratify: str | None = None  # folds: the binary task of whose labels each has its share
    hold_back: Part | None = None  # folds: what of the other folds validates; none: the next fold
    fold_in: Part = 0.5  # user_holdout: the part of a held-out user's events that is shown
    validation_files: tuple[str, ...] = ()  # kind "files": (): `validation` of the training rows
    test_files: tuple[str, ...] = ()  # kind "files": these are the test set
    seed: Natural = 0

    @property
    def whole(self) -> bool:
        """Whether every event trains, whatever the kind: validation = 0 and test = 0."""
        return not self.validation and not self.test

    @property
    def validates(self) -> bool:
        """Whether events are held back to choose by."""
        return bool(self.validation or (self.validation_files and not self.whole))


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Leaks that stop the preparation, and what is let through on purpose."""

    __pydantic_config__ = _STRICT
    # "feature/task": this feature may determine that label; "feature": any label
    allow: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Task:
    """One thing to predict."""

    __pydantic_config__ = _STRICT
    kind: Literal["retrieval", "binary", "regression", "multiclass", "ordinal", "watch_time"]
    column: str = ""  # label column; "": the task's own name (unused by retrieval)
    at_least: float | None = None  # binary: label 1 where the column is >= this
    equals: str | None = None  # binary: label 1 where the column equals this text
    where: str = ""  # sample space: only rows where this binary task's label is 1
    weight: Amount = 1.0  # static loss weight, and the start of every balancing method
    weight_column: str = ""  # column with the weight of each training example in the loss
    loss: Literal[
        "",  # the first of its kind (`losses.tasks`)
        "pointwise",  # binary, regression, multiclass
        "proportional_odds",  # ordinal
        "coral",
        "weighted_logistic",  # watch_time
        "duration_quantiles",
        "pairwise",  # binary, regression, ordinal: over the lists that users were shown
        "listwise",  # binary, ordinal
    ] = ""
    lists: Literal["user", "request"] = "user"  # a list: the positions of an example, or of them
    # those of one time, where data.hide_ties is true
    pointwise: Share = 0.0  # with a loss over lists: this part of the loss is the kind's own
    duration: str = ""  # watch_time: the items' feature whose values are groups of durations
    reference: str = ""  # column with an existing system's prediction, evaluated beside the model


RowRule = Literal["sgd", "adagrad", "rowwise_adagrad", "lazy_adam", "ftrl"]


@dataclass(frozen=True, kw_only=True)
class Table:
    """An embedding table: of a feature, or "item", the items' own rows. `table_of` has defaults."""

    __pydantic_config__ = _STRICT
    update: Literal["", "sparse", "dense"] = ""  # sparse: by rows, default of "item"; dense: whole
    rule: Literal["", RowRule] = ""  # of sparse updates; "": train.row_optimizer
    capacity: Natural = 0  # values that it may grow to without moving a row; 0: as they are
    hash_rows: Natural = 0  # rows that all its ids share, several each; 0: each has one of its own
    hash_functions: Count = 2  # with hash_rows: rows of an id, whose sum is its vector
    id_dropout: Fraction = 0.0  # share of the ids that training takes for unknown


@dataclass(frozen=True, kw_only=True)
class Bias:
    """What made people act beside what was shown, such as the place on the page: see
    `models.bias`."""

    __pydantic_config__ = _STRICT
    features: Annotated[tuple[str, ...], Field(min_length=1)]  # on = "request"; nothing else reads
    tasks: tuple[str, ...] = ()  # whose logits it explains; (): of all but retrieval
    hidden: MaybeHidden = (16,)
    dropout: Fraction = 0.1  # share of the positions that training takes without it


@dataclass(frozen=True, kw_only=True)
class Model:
    """Architecture."""

    __pydantic_config__ = _STRICT
    width: Count = 64  # D: table rows, user and item vectors
    dropout: Fraction = 0.1  # in the encoder and before the towers
    event_dropout: Fraction = 0.0  # of a history's events, that the encoder does not see
    item_id_scale: float = 1.0  # of an item's own row beside its features; < 1: features lead
    temperature: Positive = 0.05  # of the cosine in the loss of the retrieval
    learn_temperature: bool = False  # from this one on
    encoder: Annotated[Any, Choice(ENCODERS, "transformer")] = field(default_factory=Transformer)
    interests: Count = 1  # vectors of a user; the one that is nearest to an item counts
    numbers: Annotated[Any, Choice(NUMBERS, "plain")] = field(default_factory=PlainNumbers)
    interaction: Annotated[Any, Choice(INTERACTIONS, "none")] = field(default_factory=NoInteraction)
    towers: Annotated[Any, Choice(TOWERS, "mmoe")] = field(default_factory=MMoE)
    members: Count = 1  # K, of an ensemble
    # "layers": all weights but a few of each one's own; "encoder": no table or layer of the towers
    members_share: Literal["layers", "encoder"] = "layers"
    bias: Bias | None = None
    fusion: Annotated[Any, Choice(FUSIONS, "weighted")] = field(default_factory=Weighted)
    fusion_objective: dict[str, Worth] = field(default_factory=dict)  # {task: worth}; {}: each 1


@dataclass(frozen=True, kw_only=True)
class Train:
    """Optimization."""

    __pydantic_config__ = _STRICT
    epochs: Natural = 0  # exactly one of epochs and steps is above 0
    steps: Natural = 0
    batch_size: Count = 128
    length_buckets: Count = 1  # shapes of batches: examples with shorter histories come in larger
    # ones, so that little time is spent on padding; each is compiled by itself
    accumulate: Count = 1  # parts in which a step takes its batch, to need less memory
    seed: Natural = 0
    optimizer: Literal["adam", "adamw", "adagrad", "sgd"] = "adam"
    learning_rate: Positive = 1e-3
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: Natural = 0
    weight_decay: Amount = 0.0
    clip_norm: Amount = 0.0  # 0: no clipping
    row_optimizer: RowRule = "lazy_adam"  # of tables with update = "sparse"
    row_learning_rate: Amount = 0.0  # 0: learning_rate
    row_weight_decay: Amount = 0.0  # decoupled, of the rows that a step touches
    row_clip_norm: Amount = 0.0  # of each touched row's gradient; 0: no clipping
    row_precision: Literal["same", "bfloat16"] = "same"  # as stored; bfloat16: rounded at random
    balance: Annotated[Any, Choice(BALANCERS, "static")] = field(default_factory=Static)
    retrieval: Annotated[Any, Choice(RETRIEVAL, "softmax")] = field(default_factory=Softmax)
    negatives: Annotated[Any, Choice(NEGATIVES, "uniform")] = field(default_factory=Uniform)
    contrast: Contrast | None = None  # a loss that two altered views of a history are alike
    evaluate_every: Natural = 0  # steps; 0: each epoch
    checkpoint_every: Natural = 0  # steps; 0: with each evaluation
    checkpoint_wait: bool = False  # steps wait until it is written: tables need no second copy
    log_every: Count = 50
    not_finite: Literal["stop", "skip"] = "stop"  # what a loss or gradient of NaN or infinity does
    input_timeout: Natural = 600  # seconds without a batch before training stops; 0: never
    patience: Natural = 0  # evaluations without improvement before stopping; 0: never
    mesh: tuple[Natural, Natural] = (0, 1)  # devices on ("data", "table"); 0: all that are left
    precision: Literal["float32", "float64"] = "float32"


@dataclass(frozen=True, kw_only=True)
class Select:
    """The declared validation metric by which the best checkpoint is kept."""

    __pydantic_config__ = _STRICT
    metric: str | Metrics | dict[str, float] = ""  # "task/metric" such as "next_item/ndcg@10", or
    # several: their mean, or {"task/metric": weight}: their weighted sum; "": the first task's main


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """What is measured, and beside what."""

    __pydantic_config__ = _STRICT
    ks: Sizes = (10,)
    exclude_seen: bool = True
    seen: tuple[str, ...] = ()  # binary tasks: a past event with a 1 in one makes its item seen;
    # (): what the retrieval task counts, its `where` or any event; ("any",): any event
    among: Literal["all", "untrained"] = "all"  # items that targets are ranked among; "untrained":
    # those without training events, among themselves; targets with some are not ranked then
    targets: Literal["all", "last"] = "all"  # that are ranked; "last": of each user the last one
    candidates: Count = 100  # retrieved items that the towers and the fusion put in order
    diversify: Annotated[Any, Choice(DIVERSIFIERS)] | None = None  # puts the lists together so that
    # their items differ, in `recommend` too; None: in the plain order
    calibration: Literal["platt", "temperature", "isotonic", "none"] = "platt"  # fitted on
    # validation when training ends: what the fusion takes for probabilities
    calibrate: bool = False  # predictions and their metrics are calibrated as well
    baselines: tuple[Annotated[Any, Choice(BASELINES)], ...] = ()
    bootstrap: Natural = 200  # resamples of users for the 95 % intervals; 0: none
    segments: tuple[str, ...] = ()  # features, and "cold_users", "cold_items": all metrics by value
    batch_size: Count = 512


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Rules of a protocol that a published figure was measured by; "": nothing is said of one."""

    __pydantic_config__ = _STRICT
    split: SplitKind | Literal[""] = ""  # as `split.kind`
    test: Fraction | None = None  # as `split.test`; None: nothing is said of it
    past: Literal["", "rolling", "frozen"] = ""  # as `data.past`
    ranked: Literal["", "all", "last"] = ""  # as `evaluate.targets`
    query_time: Literal["", "unknown", "known"] = ""  # to the retrieval


@dataclass(frozen=True, kw_only=True)
class Published:
    """A figure from the literature under the same protocol, printed as such beside our own."""

    __pydantic_config__ = _STRICT
    name: str
    task: str
    metrics: dict[str, float]
    source: str
    split: Literal["validation", "test"] = "test"
    protocol: str = ""  # hash of the protocol it was measured by; "": said to be the same
    under: Rules | None = None


@dataclass(frozen=True, kw_only=True)
class Tune:
    """What `mtrec study tune` searches; see `studies.tune`."""

    __pydantic_config__ = _STRICT
    trials: Count = 20  # in all, the defaults among them
    # {key: "low..high", "low..high:log" or a list of values}
    ranges: dict[str, str | tuple[Any, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A whole experiment, as read from one TOML file."""

    __pydantic_config__ = _STRICT
    name: str
    left_out: tuple[str, ...] = ()  # tasks of the data that it does not train; labels may name them
    data: Data = field(default_factory=Data)
    clean: Clean = field(default_factory=Clean)
    split: Annotated[Split, _ALONE] = field(default_factory=Split)
    guard: Guard = field(default_factory=Guard)
    features: dict[str, Annotated[Feature, CHOICE]] = field(default_factory=dict)
    tasks: dict[str, Annotated[Task, _ALONE]] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)  # {feature or "item": its table}
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)
    select: Select = field(default_factory=Select)
    evaluate: Evaluate = field(default_factory=Evaluate)
    tune: Tune | None = None  # None: nothing is declared
    published: tuple[Published, ...] = ()


def to_dict(experiment: Any) -> dict[str, Any]:
    """A configuration dataclass as plain TOML-able values: no None, tuples as lists."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            pairs = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
            return {k: plain(v) for k, v in pairs if v is not None}
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    return plain(experiment)


def to_toml(experiment: Experiment) -> str:
    """The resolved experiment as TOML text; `parse_experiment` of it gives the same object."""
    return tomli_w.dumps(to_dict(experiment))


def table_of(experiment: Experiment, name: str) -> Table:
    """The table of a feature, or of "item", with what holds where the configuration says nothing.

    >>> table_of(Experiment(name="a"), "item").update, table_of(Experiment(name="a"), "city").update
    ('sparse', 'dense')
    """
    table = experiment.tables.get(name, Table())
    update = table.update or ("sparse" if name == "item" else "dense")
    return dataclasses.replace(
        table, update=update, rule=table.rule or experiment.train.row_optimizer
    )


class Selection(NamedTuple):
    """What chooses the best checkpoint: the mean, or a weighted sum, of some metrics."""

    metrics: tuple[tuple[str, str], ...]  # (task, metric)
    larger: bool  # is better
    weights: tuple[float, ...] = ()  # of a sum; (): the mean

    @property
    def name(self) -> str:
        """For people: "click/auc", "mean of click/auc, like/auc", "1 click/auc - 2 like/ne"."""
        names = ["/".join(pair) for pair in self.metrics]
        if self.weights:
            parts = zip(self.weights, names, strict=True)
            signed = (f"{'-' if w < 0 else '+'} {abs(w):g} {n}" for w, n in parts)
            return " ".join(signed).removeprefix("+ ")
        return names[0] if len(names) == 1 else f"mean of {', '.join(names)}"

    def value(self, tasks: Mapping[str, Mapping[str, float]]) -> float:
        """The one number of the metrics {task: {metric: value}}; nan where one is undefined.

        >>> both = Selection((("click", "auc"), ("like", "auc")), larger=True)
        >>> both.value({"click": {"auc": 0.5}, "like": {"auc": 0.75}})
        0.625
        >>> both._replace(weights=(2.0, 1.0)).value({"click": {"auc": 0.5}, "like": {"auc": 0.75}})
        1.75
        """
        values = [tasks[task][metric] for task, metric in self.metrics]
        if self.weights:
            return sum(w * value for w, value in zip(self.weights, values, strict=True))
        return sum(values) / len(values)


def main_metric(experiment: Experiment, task: str) -> str:
    """The metric of a task that chooses unless told otherwise.

    >>> main_metric(Experiment(name="a", tasks={"like": Task(kind="binary")}), "like")
    'auc'
    """
    known = METRICS.get(experiment.tasks[task].kind)
    return next(iter(known)) if known else f"ndcg@{experiment.evaluate.ks[0]}"


def selection(experiment: Experiment) -> Selection:
    """The metrics that choose the best checkpoint; of a mean all are better when larger, or all
    when lower, as `experiments.check` sees to, and of a sum the larger is better."""
    declared = experiment.select.metric
    if not declared:
        task = next(iter(experiment.tasks))
        declared = f"{task}/{main_metric(experiment, task)}"
    names = (declared,) if isinstance(declared, str) else tuple(declared)
    pairs = tuple((task, metric) for task, _, metric in (name.partition("/") for name in names))
    if isinstance(declared, dict):
        return Selection(pairs, True, tuple(declared.values()))
    return Selection(pairs, metric_named(pairs[0][1]).larger_is_better)


def seen_behaviours(experiment: Experiment) -> tuple[str, ...]:
    """The binary tasks of which a 1 makes the item of a past event seen; (): any event does.

    >>> buys = {"next": Task(kind="retrieval", where="buy")}
    >>> seen_behaviours(Experiment(name="a", tasks=buys))
    ('buy',)
    >>> seen_behaviours(Experiment(name="a", tasks=buys, evaluate=Evaluate(seen=("any",))))
    ()
    """
    if experiment.evaluate.seen:
        return () if experiment.evaluate.seen == (ANY,) else experiment.evaluate.seen
    tasks = experiment.tasks.values()
    where = next((task.where for task in tasks if task.kind == "retrieval"), "")
    return (where,) if where else ()


def fusion_objective(experiment: Experiment) -> dict[str, float]:
    """{task: worth} of what may happen; by default 1 for each binary task, and for the retrieval
    task unless its event is that of a binary one, as with `where`: nothing is counted twice.

    >>> tasks = {"next": Task(kind="retrieval", where="buy"), "buy": Task(kind="binary")}
    >>> fusion_objective(Experiment(name="a", tasks=tasks))
    {'buy': 1.0}
    """
    if experiment.model.fusion_objective:
        return experiment.model.fusion_objective
    return {
        name: 1.0
        for name, task in experiment.tasks.items()
        if task.kind == "binary" or (task.kind == "retrieval" and not task.where)
    }


def utility_of(experiment: Experiment) -> Utility:
    """The declared utility: the worths of `fusion_objective`, each task's along its funnel.

    >>> tasks = {"click": Task(kind="binary"), "buy": Task(kind="binary", where="click")}
    >>> str(utility_of(Experiment(name="a", tasks=tasks)))
    '1 p(click) + 1 p(click) p(buy | click)'
    """
    tasks = experiment.tasks
    worths = {name: worth for name, worth in fusion_objective(experiment).items() if worth > 0}
    root = next((name for name in worths if tasks[name].kind == "retrieval"), "")

    def funnel(name: str) -> tuple[str, ...]:
        return (*funnel(tasks[name].where), name) if name in tasks else ()

    certain = funnel(tasks[root].where) if root else ()
    return Utility(
        root,
        tuple(
            Term(n, w, () if n == root else tuple(t for t in funnel(n) if t not in certain))
            for n, w in worths.items()
        ),
    )
