"""The report as a page: what it says, and that it says it safely."""

from __future__ import annotations

import dataclasses
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mtrec_jax.data.dataset import Prepared, Rule
from mtrec_jax.data.engine import open_engine
from mtrec_jax.data.report import summarize, write_report
from tests.data.small import make, run

DAY = 86_400
LOG = """user,item,like,time
a,x,1,0
a,y,0,100
a,z,1,86400
b,x,1,86500
b,y,,172800
b,<b>bold</b>,0,345600
c,x,0,5
,x,1,6
d,<script>alert(1)</script>,2,7
e,x
"""
VOID = {"meta", "rect"}


class Page(HTMLParser):
    """Open tags, texts, and all tags and attributes of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    experiment = make(
        data={"items": {"files": ["items.csv"]}},
        features={
            "like": {"on": "history"},
            "shelf": {"on": "item"},
            "weight": {"on": "item", "kind": "numeric"},
        },
        tasks={"next": {"kind": "retrieval"}, "like": {"kind": "binary"}},
        clean={"max_bad_fraction": 0.5},
    )
    items = "item,shelf,weight\nx,<i>top</i>,1\ny,,3\nz,low,2\n"
    return run(tmp_path_factory.mktemp("report"), experiment, LOG, items_csv=items)


def page_of(prepared: Prepared) -> tuple[str, Page]:
    path = prepared.folder / "report.html"
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_the_page_is_whole_and_loads_nothing(prepared: Prepared) -> None:
    text, page = page_of(prepared)
    assert not page.open  # every tag is closed
    assert not page.tags & {"script", "link", "img", "iframe", "object", "a", "b", "i"}
    assert not page.attributes & {"src", "href", "onload", "onclick", "srcset"}
    assert not re.search(r"https?:|url\(|@import|javascript:", text)
    assert "viewport" in text
    assert "prefers-color-scheme: dark" in text


def test_raw_text_is_escaped(prepared: Prepared, tmp_path: Path) -> None:
    hostile = Rule(rule="<img src=x onerror=alert(1)>", rows=1, examples=("</code><script>",))
    manifest = dataclasses.replace(
        prepared.manifest, name="</title><script>", protocol="a & b < c", report=(hostile,)
    )
    shutil.copytree(prepared.folder, tmp_path, dirs_exist_ok=True)
    opened = Prepared(tmp_path, manifest)
    write_report(opened, tmp_path / "report.html")
    text, page = page_of(opened)
    assert not page.tags & {"script", "img"}
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert "&lt;i&gt;top&lt;/i&gt; (1)" in text  # a value of a vocabulary
    assert "a &amp; b &lt; c" in text


def test_what_was_removed_is_shown_with_its_place(prepared: Prepared) -> None:
    _, page = page_of(prepared)
    told = " ".join(page.texts)
    assert prepared.manifest.protocol in told
    assert "log.csv line 9" in told  # the row without a user
    assert "missing user" in told
    assert "log.csv line 11" in told  # the short line
    shown = [page.texts[i + 1] for i, t in enumerate(page.texts) if t == "rows in quarantine"]
    assert shown == ["3"]


def test_tasks_and_features_have_their_figures(prepared: Prepared) -> None:
    _, page = page_of(prepared)
    row = page.texts.index("like")
    # a: x, y, z and b: x, y, <b> by leave-one-out: x trains, as does c
    assert page.texts[row : row + 5] == ["like", "binary", "3 · 66.7%", "1 · 0.0%", "2 · 50.0%"]
    row = page.texts.index("shelf")
    assert page.texts[row + 1 : row + 5] == ["item", "categorical", "1", "50.0%"]  # of 4 items
    row = page.texts.index("weight")
    assert page.texts[row + 1 : row + 4] == ["item", "numeric", "1 ± 1"]


def test_events_are_counted_by_day_and_split(prepared: Prepared) -> None:
    summary = prepared.manifest.summary
    assert summary is not None
    assert (summary.start, summary.width) == (0.0, DAY)
    assert summary.counts == {
        "train": [2, 1, 0, 0, 0],  # a x, c x; b x
        "validation": [1, 0, 1, 0, 0],  # a y; b y
        "test": [0, 1, 0, 0, 1],  # a z; b <b>
    }
    text, _ = page_of(prepared)
    assert "<title>1970-01-01: 2 train, 1 validation</title>" in text
    assert "<title>1970-01-04: no event</title>" in text
    assert "most: 3 events a day" in text
    assert "1970-01-05" in text


def test_long_logs_have_bars_of_several_days(tmp_path: Path) -> None:
    days = np.array([0, 1, 2, 999])
    table = pa.table(
        {
            "split": pa.array([0, 0, 0, 2], pa.int8()),
            "time": 3 * DAY + 0.5 + days * DAY,
        }
    )
    with open_engine(tmp_path) as duckdb:
        labels: dict[str, dict[int, tuple[int, float | None]]] = {
            "next": {0: (3, 1.0), 2: (1, 2 / 3)},
            "class": {0: (2, None)},
        }
        summary = summarize(duckdb.load("events", table), labels)
    assert (summary.start, summary.width) == (3 * DAY, 11 * DAY)  # 1,000 days in 91 bars
    assert len(summary.counts["train"]) == len(summary.counts["test"]) == 91
    assert summary.counts["train"][0] == 3
    assert summary.counts["test"][90] == 1
    assert summary.labels == {
        "next": {"train": (3, 1.0), "test": (1, 0.666667)},
        "class": {"train": (2, None)},
    }


def test_data_without_times_has_no_chart(tmp_path: Path) -> None:
    table = pa.table({"split": pa.array([0], pa.int8())})
    with open_engine(tmp_path) as duckdb:
        summary = summarize(duckdb.load("events", table), {})
    assert summary.counts == {}
