"""The `mtrec` command: what it accepts, what it writes, and the status it exits with."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

import mtrec_jax
from mtrec_jax.config import Experiment, to_toml
from mtrec_jax.data.dataset import Prepared, open_prepared
from mtrec_jax.result import Result
from mtrec_jax.serving.recommender import Recommender
from mtrec_jax.train.run import Run

COMMANDS = (
    *("data", "clean", "prepare", "train", "evaluate", "compare", "predict", "recommend", "run"),
    *("plan", "doctor", "study"),
)
Mtrec = Callable[..., tuple[int, str, str]]


def flat(text: str) -> str:
    """Text without the frames and line breaks of a terminal."""
    return " ".join("".join(c for c in text if c not in "│╭╮╰╯─").split())


@pytest.fixture
def own_run(shop_run: Run, tmp_path: Path) -> Path:
    """A copy of the run's folder, to be written to."""
    shutil.copytree(shop_run.folder, tmp_path / "run")
    return tmp_path / "run"


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


READERS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".csv": lambda path: pyarrow.csv.read_csv(path).to_pylist(),
    ".jsonl": read_lines,
    ".parquet": lambda path: pq.read_table(path).to_pylist(),
}
WRITTEN = [pytest.param(s, marks=[pytest.mark.slow] * (s != ".parquet")) for s in READERS]


def test_help_is_complete_and_loads_no_jax() -> None:
    code = f"""
import sys
from mtrec_jax import cli
for command in ([], *([name] for name in {COMMANDS})):
    sys.argv = ["mtrec", *command, "--help"]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, command
    heavy = {{"jax", "numpy", "pyarrow", "ibis", "flax"}}
    heavy |= set() if command else {{"pydantic"}}  # which Typer loads for arguments
    heavy &= {{m.split(".")[0] for m in sys.modules}}
    assert not heavy, heavy
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    shown = flat(ran.stdout)
    assert all(f" {name} " in shown for name in COMMANDS)
    for option in ("--set", "--prepared", "--run", "--split", "--all-users", "--k", "--rows"):
        assert option in shown
    assert "129, 130, 143 stopped by SIGHUP, Ctrl-C, SIGTERM" in shown


def test_the_version_is_said(mtrec: Mtrec) -> None:
    assert mtrec("--version") == (0, f"mtrec_jax {mtrec_jax.__version__}\n", "")


def test_doctor_says_what_a_bug_report_needs(mtrec: Mtrec, tmp_path: Path) -> None:
    status, out, err = mtrec("doctor", "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert report["versions"]["mtrec_jax"] == mtrec_jax.__version__
    assert report["versions"]["jaxlib"] == jax.lib.__version__
    assert report["devices"] == {"platform": "cpu", "count": jax.device_count(), "kinds": ["cpu"]}
    assert report["processor"]["cores"] == os.cpu_count()
    assert report["memory"]["machine"].endswith(" GB")
    assert report["packages"]["mtrec_jax"] == "complete"
    assert report["environment"]["MTREC_CACHE"] == "off"
    assert not any("failed" in part for part in report.values())
    status, out, _ = mtrec("doctor")
    assert status == 0
    assert flat(out).startswith(f"versions mtrec_jax {mtrec_jax.__version__} Python ")
    assert "container's limit" in out


def test_doctor_names_what_is_missing_for_an_extra(
    mtrec: Mtrec, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = {
        "mtrec_jax": [
            "numpy>=2.1",
            "jax<0.2",
            'pyspark>=4; extra == "spark"',
            'nothing-like-it[all]>=1; extra == "cuda13"',
            'numpy[more]; extra == "tpu"',
            'never; extra == "tpu" and python_version < "3"',
        ],
        "numpy": ['also-missing; extra == "more"'],
    }
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needs.get(name, []))
    packages = json.loads(mtrec("doctor", "--json")[1])["packages"]
    assert packages["mtrec_jax"].startswith(f"missing jax<0.2 (here {jax.__version__})")
    assert packages["mtrec_jax[spark]"] == "complete"
    for extra, missing in (("cuda13", "nothing-like-it"), ("tpu", "also-missing")):
        name = f"mtrec_jax[{extra}]"
        assert packages[name] == f'missing {missing}: pip install "{name}"'


def test_doctor_says_what_is_broken(mtrec: Mtrec, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr(jax, "devices", broken)
    status, out, _ = mtrec("doctor")
    assert status == 0
    assert "failed RuntimeError: no driver" in flat(out)


def test_no_arguments_show_the_help(mtrec: Mtrec) -> None:
    status, out, err = mtrec()
    assert "recommend" in out + err
    assert status in (0, 2)


@pytest.mark.parametrize(
    "arguments",
    [("recomend", "runs/shop"), ("train",), ("recommend", "run", "--users", "a", "--k", "0")],
)
def test_wrong_usage_exits_with_2(mtrec: Mtrec, arguments: tuple[str, ...]) -> None:
    status, out, err = mtrec(*arguments)
    assert status == 2
    assert not out
    assert err.startswith("Usage: ")
    assert "Error" in err


def test_our_errors_are_one_message_on_standard_error(mtrec: Mtrec, tmp_path: Path) -> None:
    status, out, err = mtrec("evaluate", tmp_path / "nowhere")
    assert status == 2
    assert not out
    assert err.startswith(f"mtrec: {tmp_path / 'nowhere'} is no run folder")
    assert "Traceback" not in err


def test_public_data_sets_are_listed_with_their_terms(mtrec: Mtrec) -> None:
    status, out, _ = mtrec("data", "list")
    assert status == 0
    names = [line.split()[0] for line in out.splitlines()]
    fetched = ["ml-1m", "ml-100k", "census-income", "all-minilm-l6-v2"]
    assert names == [*fetched, "shop", "shop-social", "shop-requests"]
    assert out.count("no commercial use") == 2
    assert out.count(". Terms: ") == len(names)
    assert out.rstrip().endswith("Terms: none, it is generated on this machine.")


def test_the_shop_is_generated(mtrec: Mtrec, tmp_path: Path) -> None:
    status, _, err = mtrec("data", "shop", "--to", tmp_path, "--seed", 5)
    assert status == 0
    assert json.loads((tmp_path / "shop" / "truth.json").read_text())["seed"] == 5
    assert "Best possible: click auc 0." in err
    events = tmp_path / "shop" / "events.csv"
    written = events.stat().st_mtime_ns
    status, _, err = mtrec("data", "shop", "--to", tmp_path, "--seed", 5)
    assert status == 0
    assert "is there already (generated, seed 5)" in flat(err)
    assert events.stat().st_mtime_ns == written
    for name in ("census-income", "list"):
        status, out, err = mtrec("data", name, "--to", tmp_path, "--seed", 5)
        assert (status, out) == (2, "")
        assert "--seed is for the generated shop" in flat(err)


def test_run_leaves_an_existing_shop_as_it_is(
    mtrec: Mtrec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    events = tmp_path / "data" / "shop" / "events.csv"
    events.parent.mkdir(parents=True)
    events.write_text("mine\n1\n", encoding="utf-8")
    status, _, err = mtrec("run", "shop")
    assert status == 2, "these events have no users"
    assert "shop in data/shop is there already and stays as it is" in flat(err)
    assert events.read_text(encoding="utf-8") == "mine\n1\n"


def test_prepare_train_evaluate(
    mtrec: Mtrec, tmp_path: Path, shop_experiment: Experiment, shop_data: Path, shop_run: Run
) -> None:
    """The way of a new user, with the folders of their choice; training equals the Python call."""
    config, prepared, run = (tmp_path / n for n in ("mine.toml", "prepared", "run"))
    config.write_text(to_toml(shop_experiment), encoding="utf-8")
    places = ("--data", shop_data.parent)
    cleaned = tmp_path / "cleaned"
    status, _, err = mtrec("clean", config, *places, "--out", cleaned)
    assert status == 0, err
    assert f"events in {cleaned}; " in flat(err)
    status, _, err = mtrec("prepare", config, *places, "--out", prepared, "--cleaned", cleaned)
    assert status == 0, err
    assert f"clean events of {cleaned} are used again" in flat(err)
    assert "48 users" in flat(err)
    assert "label of buy missing (masked)" in flat(err)
    assert open_prepared(prepared).manifest == shop_run.prepared.manifest
    train = ("train", config, "--prepared", prepared, "--run", run)
    status, _, err = mtrec(*train, "--set", "train.seed=0")
    assert status == 0, err
    assert "step 27 of 27: validation click/auc 0." in flat(err)
    assert f"trained: {run}" in flat(err)
    metrics, expected = (
        [line for line in (r / "metrics.jsonl").read_text().splitlines() if "timing" not in line]
        for r in (run, shop_run.folder)
    )
    assert metrics == expected
    status, _, err = mtrec(*train)
    assert status == 0
    assert "is trained already, up to step 27: nothing to do" in flat(err)
    status, _, err = mtrec(*train, "--set", "train.seed=1")
    assert status == 2
    assert "train.seed: 0 there, 1 here" in err


def test_evaluate_writes_everything_and_counts_looks(
    mtrec: Mtrec, own_run: Path, shop_experiment: Experiment
) -> None:
    baselines = {"popularity", "item_knn", "bias", shop_experiment.data.reference}

    def looked(*arguments: str) -> dict[str, Any]:
        status, out, err = mtrec("evaluate", own_run, *arguments)
        assert status == 0, err
        assert all(name in out for name in ("this model", *baselines))
        stored = json.loads((own_run / "evaluation.json").read_text(encoding="utf-8"))
        assert f"looks at the test set so far: {stored['test_looks']}" in err
        return stored

    first = looked()
    assert (first["split"], first["test_looks"]) == ("validation", 0)
    assert first["protocol"]["sentence"].startswith("split at two points in time")
    assert set(first["tasks"]) == {"next_item", "click", "buy", "stars"}
    assert set(first["baselines"]) == baselines
    assert set(first["orders"]) == {"fused", *first["tasks"]}
    assert looked("--split", "test")["test_looks"] == 1
    assert looked("--split", "test")["test_looks"] == 2
    assert looked("--split", "validation")["test_looks"] == 2


def test_compare_takes_what_runs_keep_and_refuses_other_rules(
    mtrec: Mtrec, own_run: Path, tmp_path: Path
) -> None:
    """A run beside a copy of itself differs by nothing; the second time nothing is evaluated."""
    beside = own_run.parent / "beside"
    shutil.copytree(own_run, beside)
    status, out, err = mtrec("compare", own_run, beside)
    assert status == 0, err
    lines = [line.split() for line in out.splitlines()]
    [found] = [line[3:] for line in lines if line[:3] == ["next_item", "ndcg@10", "↑"]]
    assert found[0] == found[1]
    assert found[2:] == ["+0.0000", "+0.0000", "to", "+0.0000", "1.000"]
    kept = (beside / "users-validation.parquet").stat().st_mtime_ns
    table = tmp_path / "table.jsonl"
    status, out, err = mtrec("compare", own_run, beside, "--metrics", "click/auc", "--out", table)
    assert (status, out) == (0, ""), err
    assert (beside / "users-validation.parquet").stat().st_mtime_ns == kept
    [row] = [json.loads(line) for line in table.read_text("utf-8").splitlines()]
    assert (row["task"], row["metric"], row["beside p"]) == ("click", "auc", 1)
    status, _, err = mtrec("compare", own_run)
    assert status == 2
    assert "name two or more" in flat(err)
    config = beside / "config.toml"
    config.write_text(config.read_text("utf-8").replace("ks = [\n    10,\n]", "ks = [3]"), "utf-8")
    status, _, err = mtrec("compare", own_run, beside, "--split", "test")
    assert status == 2
    assert "were measured by other protocols: ks: (10,) and (3,)" in flat(err)
    assert json.loads((own_run / "evaluation.json").read_text("utf-8"))["test_looks"] == 0


def test_recommend_prints_a_table_for_each_user(mtrec: Mtrec, shop_run: Run) -> None:
    status, out, err = mtrec(
        "recommend", shop_run.folder, "--users", "u00003", "u00001", "--users", "u00042", "--k", 3
    )
    assert (status, err) == (0, "")
    lines = out.splitlines()
    users = [line.split()[0] for line in lines if line.startswith("u0")]
    assert sorted(users) == ["u00001", "u00003", "u00042"]
    assert lines[-1].startswith("order: ") or lines[0].startswith("order: ")
    assert len(lines) == 3 * (1 + 1 + 3) + 1
    expected = Recommender(shop_run).recommend(["u00003"], 3)
    start = lines.index("u00003")
    for line, item, title in zip(
        lines[start + 2 : start + 5], expected["item"], expected["title"], strict=True
    ):
        assert item in line
        assert title in line


def test_seen_items_and_what_they_leave(mtrec: Mtrec, shop_run: Run, tmp_path: Path) -> None:
    base = ("recommend", shop_run.folder, "--k", 60)
    out = tmp_path / "out.csv"
    status, _, err = mtrec(*base, "--users", "u00003", "u00003", "--out", out)
    assert status == 0
    items = [r["item"] for r in READERS[".csv"](out)]
    assert 0 < len(items) == len(set(items)) < 60, "a user who is named twice is answered once"
    assert "some users get fewer than 60 items" in flat(err)
    assert "--include-seen keeps them" in flat(err)
    status, _, err = mtrec(*base, "--users", "u00003", "--include-seen", "--out", out)
    assert status == 0
    assert flat(err).startswith(f"60 recommendations in {out}; order: ")
    assert "fewer" not in err
    assert {r["item"] for r in READERS[".csv"](out)} == set(shop_run.prepared.item_names)
    status, _, err = mtrec(*base, "--all-users", "--include-seen", "--out", out)
    assert f"{48 * 60:,} recommendations in {out}" in err
    _, _, err = mtrec(*base, "--all-users", "--out", out)
    assert "--include-seen keeps them" in flat(err)


def test_unknown_users_are_warned_about_and_answered(
    mtrec: Mtrec, shop_run: Run, tmp_path: Path
) -> None:
    out, asked = tmp_path / "out.csv", ("--users", " u00003 ", "martian", "--k", 2)
    status, shown, err = mtrec("recommend", shop_run.folder, *asked, "--out", out)
    assert (status, shown) == (0, "")
    assert "mtrec: 1 unknown user ('martian'): not in the prepared data" in err
    known = {(r["user"], r["known"]) for r in READERS[".csv"](out)}
    assert known == {("u00003", True), ("martian", False)}
    _, shown, _ = mtrec("recommend", shop_run.folder, "--users", "martian", "--k", 2)
    assert "martian  (unknown user: the most popular items)" in shown


@pytest.mark.parametrize("suffix", WRITTEN)
def test_everyone_is_answered_in_a_file(
    mtrec: Mtrec, shop_run: Run, tmp_path: Path, suffix: str
) -> None:
    out = tmp_path / f"all{suffix}"
    status, shown, err = mtrec("recommend", shop_run.folder, "--all-users", "--k", 4, "--out", out)
    assert (status, shown) == (0, "")
    rows = READERS[suffix](out)
    assert len(rows) == 4 * 48
    assert f"192 recommendations in {out}" in flat(err)
    assert list(rows[0])[:6] == ["user", "known", "rank", "item", "title", "score"]
    assert {r["user"] for r in rows} == set(shop_run.prepared.user_names)
    assert [r["rank"] for r in rows] == [1, 2, 3, 4] * 48


def test_users_and_files_must_be_said(mtrec: Mtrec, shop_run: Run, tmp_path: Path) -> None:
    run = shop_run.folder
    status, _, err = mtrec("recommend", run, "--all-users")
    assert status == 2
    assert "--all-users writes a file: add --out FILE" in flat(err)
    for wrong in ((), ("--users", "a", "--all-users", "--out", tmp_path / "out.csv")):
        status, _, err = mtrec("recommend", run, *wrong)
        assert status == 2
        assert "name --users, or ask for --all-users" in flat(err)
    status, _, err = mtrec("recommend", run, "--users", "a", "--out", tmp_path / "out.xlsx")
    assert status == 2
    assert "the file name must end in .csv, .jsonl, .parquet" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_filters_from_the_command_line(mtrec: Mtrec, shop_run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    names = shop_run.prepared.item_names
    base = ("recommend", shop_run.folder, "--users", "martian", "--out", out)
    allowed = [part for name in names[:4] for part in ("--allowed", name)]
    assert mtrec(*base, *allowed, "--blocked", names[1])[0] == 0
    assert [r["item"] for r in READERS[".jsonl"](out)] == [names[0], *names[2:4]]
    status, _, err = mtrec(*base, "--allowed", "zzz")
    assert status == 2
    assert "leave no item (not in the catalogue: 1 id, 'zzz')" in err
    status, _, err = mtrec(*base, "--allowed", "zzz", "--unknown-items", "error")
    assert "item 'zzz' is not in the catalogue" in err
    (tmp_path / "gone.txt").write_text("i0001\nzzz\n", encoding="utf-8")
    files = ("--blocked-file", tmp_path / "gone.txt", "--blocked", "i0002", "--order-by", "buy")
    known = ("recommend", shop_run.folder, "--users", "u00003", "--out", out, "--k", 60)
    status, _, err = mtrec(*known, *files, "--include-seen")
    assert (status, "blocked: not in the catalogue, and ignored: 1 id" in err) == (0, True)
    found = READERS[".jsonl"](out)
    assert not {"i0001", "i0002"} & {row["item"] for row in found}
    buys = [float(row["buy"]) for row in found]
    assert buys == sorted(buys, reverse=True)


def test_filters_hold_for_everyone(mtrec: Mtrec, shop_run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    names = shop_run.prepared.item_names
    allowed = [part for name in names[:30] for part in ("--allowed", name)]
    base = ("recommend", shop_run.folder, "--all-users", "--out", out, "--k", 3)
    status, _, err = mtrec(*base, *allowed, "--blocked", names[1], "--blocked", names[2])
    assert status == 0, err
    shown = {r["item"] for r in READERS[".jsonl"](out)}
    assert shown
    assert shown <= {names[0], *names[3:30]}


def test_lists_of_users_and_quotas(mtrec: Mtrec, shop_run: Run, tmp_path: Path) -> None:
    out, names = tmp_path / "out.jsonl", shop_run.prepared.item_names
    lists = {"u00001": set(names[:20]), "u00003": set(names[20:])}
    lines = [f"{user},{item}" for user, items in lists.items() for item in sorted(items)]
    (tmp_path / "lists.csv").write_text("\n".join(["user,item", *lines]))
    base = ("recommend", shop_run.folder, "--users", "u00001", "--users", "u00003", "--out", out)
    asked = (*base, "--k", 4, "--allowed-by-user", tmp_path / "lists.csv")
    status, _, err = mtrec(*asked, "--at-most", "brand=1", "--include-seen")
    assert status == 0, err
    brand = dict(zip(names, shop_run.prepared.items["item_brand"].to_pylist(), strict=False))
    for user, allowed in lists.items():
        shown = [r["item"] for r in READERS[".jsonl"](out) if r["user"] == user]
        assert len(shown) == len({brand[item] for item in shown}) == 4
        assert set(shown) <= allowed
    status, _, err = mtrec(*base, "--at-most", "brand")
    assert (status, "write COLUMN=NUMBER" in flat(err)) == (2, True)
    status, _, err = mtrec(*asked, "--allowed", names[0])
    assert (status, "in the place of the other --allowed" in flat(err)) == (2, True)


@pytest.mark.parametrize(
    "words",
    [
        ("--users", "u00001", "--blocked", "i0001", "i0002"),
        ("--users", "u00001", "--allowed", "i0001", "i0002"),
        ("--all-users", "--out", "out.csv", "--blocked", "i0001", "i0002"),
        ("i0002",),
    ],
)
def test_further_item_ids_are_not_taken_for_users(
    mtrec: Mtrec, shop_run: Run, words: tuple[str, ...]
) -> None:
    status, out, err = mtrec("recommend", shop_run.folder, *words)
    assert (status, out) == (2, "")
    assert "unexpected i0002: repeat the option for each id" in flat(err)
    assert "--blocked i1 --blocked i2" in flat(err)


@pytest.mark.parametrize("suffix", WRITTEN)
def test_pairs_are_predicted(
    mtrec: Mtrec, shop_run: Run, shop_recommender: Recommender, tmp_path: Path, suffix: str
) -> None:
    rows, out = tmp_path / f"pairs{suffix}", tmp_path / f"out{suffix}"
    pairs = {"item": ["i0002", "i0005"], "user": ["u00001", "martian"], "note": ["x", "y"]}
    Result(pa.table(pairs)).save(rows)
    given = "predict", shop_run.folder, "--rows", rows, "--out", out, "--looks"
    status, _, err = mtrec(*given)
    assert status == 0, err
    assert "mtrec: 1 pair" in err
    assert "not in the prepared data" in err
    found = READERS[suffix](out)
    assert [(r["user"], r["item"], r["known"]) for r in found] == [
        ("u00001", "i0002", True),
        ("martian", "i0005", False),
    ]
    asked = ["u00001", "martian"], ["i0002", "i0005"]
    expected = shop_recommender.predict(*asked, looks=True)
    for column in ("click", "gates/buy/1", "weight click"):
        assert found[0][column] == pytest.approx(expected[column][0], rel=1e-5)
    assert found[1]["click"] in (None, "")


def test_the_prepared_folder_may_have_moved(
    mtrec: Mtrec, own_run: Path, shop_prepared: Prepared, tmp_path: Path
) -> None:
    notes = json.loads((own_run / "prepared.json").read_text())
    notes["folder"] = str(tmp_path / "gone")
    (own_run / "prepared.json").write_text(json.dumps(notes))
    base = ("recommend", own_run, "--users", "u00001", "--k", 1)
    status, _, err = mtrec(*base)
    assert status == 2
    assert str(tmp_path / "gone") in err
    assert "--prepared" in err
    assert mtrec(*base, "--prepared", shop_prepared.folder)[0] == 0


@pytest.mark.slow
def test_everything_at_once(
    mtrec: Mtrec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shop_experiment: Experiment,
    shop_data: Path,
) -> None:
    """`mtrec run` in an empty folder, with the defaults for every folder; the data is there."""
    from mtrec_jax.data import shop

    def small(to: Path, seed: int = 0, social: bool = False) -> dict[str, Any]:
        shutil.copytree(shop_data, to)
        return json.loads((shop_data / "truth.json").read_text())

    monkeypatch.setattr(shop, "generate", small)
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(to_toml(shop_experiment), encoding="utf-8")
    status, out, err = mtrec("run", "mine.toml")
    assert status == 0, err
    assert "this model" in out
    folders = ("data/shop", "prepared/shop", "runs/shop")
    assert all((tmp_path / folder).is_dir() for folder in folders)
    assert json.loads(Path("runs/shop/evaluation.json").read_text())["split"] == "validation"


def test_two_configurations_of_one_name_are_not_one(mtrec: Mtrec) -> None:
    status, _, err = mtrec("study", "crossval", "shop", "shop")
    assert status == 2
    assert "another configuration is called 'shop'" in flat(err)
