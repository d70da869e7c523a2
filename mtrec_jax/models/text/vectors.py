"""Frozen vectors of many texts, and a file that keeps them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mtrec_jax.arguments import a_list, a_path, a_whole_number, one_of, shown
from mtrec_jax.errors import DataError
from mtrec_jax.models.text.bert import Bert, encode_packed, load_bert, weights_digest

Progress = Callable[[int, int], None]  # (texts so far, texts in all)

ROW = 64  # tokens of a row; longer texts have rows of twice, four times … as many
SHORTEST = 2  # tokens of a text: its first and its last, which are no words
_AT_ONCE = 4096  # texts whose tokens are in memory
_NOTE = b"mtrec"  # key of the file's metadata

_program = jax.jit(encode_packed, static_argnames=("sizes", "texts", "dtype"))


def text_vectors(
    texts: Sequence[Any],
    bert: Bert,
    batch_tokens: int = 1024,
    dtype: str = "float32",
    progress: Progress | None = None,
) -> np.ndarray:
    """The vectors of texts, each of length 1.

    Equal texts are encoded once. Short texts stand side by side in rows of 64 tokens, longer ones
    in rows of 128, 256 and so on, so that there is little padding and there are few programs.

    Args:
      texts: n texts; an empty one has a vector, too.
      bert: of `load_bert`.
      batch_tokens: how many tokens a program takes at once. With the default it works in less than
        32 MiB, beyond which each call maps its memory anew on CPUs.
      dtype: of the products, "float32" or "bfloat16".
      progress: called with (texts so far, texts in all); repeated texts count once.

    Returns:
      [n, D] float32.

    Raises:
      DataError: something is no text, or `batch_tokens` is none.
      ConfigError: another `dtype`.
    """
    a_whole_number("batch_tokens", batch_tokens, 1, 1 << 24, "16,777,216")
    one_of("dtype", dtype, ("float32", "bfloat16"))
    place = {text: number for number, text in enumerate(dict.fromkeys(_checked(texts)))}
    distinct = list(place)
    found = np.zeros((len(distinct), bert.sizes.width), np.float32)
    for start in range(0, len(distinct), _AT_ONCE):
        tokens = bert.tokens(distinct[start : start + _AT_ONCE])
        for size, rows in _rows(tokens):
            _encode(bert, tokens, rows, size, batch_tokens, dtype, found[start:])
        if progress is not None:
            progress(start + len(tokens), len(distinct))
    return found[[place[text] for text in texts]] if len(distinct) < len(texts) else found


def cached_text_vectors(
    texts: Sequence[Any],
    folder: Path | str,
    path: Path | str,
    progress: Progress | None = None,
) -> np.ndarray:
    """The vectors of texts, kept in a file and read from there while nothing has changed.

    The file holds a hash of the texts, in their order, and of the weights. What it holds of others,
    and a damaged file, is replaced by a whole new one. Reading needs neither the libraries of the
    extra `[text]` nor a BERT in memory.

    Args:
      texts: n texts.
      folder: of the weights, as `load_bert` takes it.
      path: a Parquet file of one column, `vector`.
      progress: as in `text_vectors`.

    Returns:
      [n, D] float32.

    Raises:
      ConfigError: vectors have to be made, and the libraries are not installed.
      DataError: something is no text, the weights cannot be read, or the file cannot be written.
    """
    path, folder = a_path("path", path), a_path("folder", folder)
    made_of = _digest(_checked(texts), folder)
    kept = _kept(path, made_of, len(texts))
    if kept is not None:
        return kept
    vectors = text_vectors(texts, load_bert(folder), progress=progress)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    table = pa.table({"vector": column}).replace_schema_metadata({_NOTE: made_of})
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, partial)
        partial.replace(path)
    except OSError as error:
        raise DataError(f"{path}: vectors of texts cannot be written: {error}") from error
    return vectors


def _checked(texts: Sequence[Any]) -> list[str]:
    found = a_list("texts", texts)
    for number, text in enumerate(found):
        if not isinstance(text, str):
            raise DataError(
                f'texts[{number}]: {shown(text)} is no text; pass "" where it is missing'
            )
    return found


def _digest(texts: Sequence[str], folder: Path) -> bytes:
    """A hash of the texts in their order and of all that makes vectors of them."""
    whole = hashlib.sha256(weights_digest(folder).encode())
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        whole.update(len(encoded).to_bytes(8, "little") + encoded)
    return whole.hexdigest().encode()


def _kept(path: Path, made_of: bytes, count: int) -> np.ndarray | None:
    """The vectors of the file, if they are those that are wanted."""
    try:
        if (pq.read_schema(path).metadata or {}).get(_NOTE) != made_of:
            return None
        column = pq.read_table(path)["vector"].combine_chunks()
        return column.flatten().to_numpy().reshape(count, column.type.list_size)
    except (OSError, pa.ArrowInvalid):  # not there, or damaged
        return None


# --- Rows of several texts


def _rows(tokens: Sequence[np.ndarray]) -> Iterator[tuple[int, list[list[int]]]]:
    """Which texts stand in each row, by the rows' length."""
    lengths = np.array([len(of) for of in tokens])
    least, size = 0, ROW
    while (lengths > least).any():
        fitting = np.flatnonzero((lengths > least) & (lengths <= size))
        if len(fitting):
            yield size, packed(lengths, fitting, size)
        least, size = size, 2 * size


def packed(lengths: np.ndarray, chosen: np.ndarray, size: int) -> list[list[int]]:
    """Texts put into rows of `size` tokens: the longest first, each into the fullest row that has
    room for it (best fit decreasing, Johnson et al., SIAM J. Comput. 1974).

    >>> packed(np.array([3, 7, 2, 5]), np.arange(4), 10)
    [[1, 0], [3, 2]]
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(size + 1)]  # [tokens left]: rows
    for number in chosen[np.argsort(-lengths[chosen], kind="stable")].tolist():
        length = int(lengths[number])
        left = next((room for room in range(length, size + 1) if with_room[room]), size)
        if with_room[left]:
            row = with_room[left].pop()
        else:
            row = len(rows)
            rows.append([])
        rows[row].append(number)
        with_room[left - length].append(row)
    return rows


def side_by_side(
    tokens: Sequence[np.ndarray], rows: Sequence[Sequence[int]], count: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of rows of texts and which of its row's texts each belongs to, as
    `encode_packed` takes them: [count, size] int32 each."""
    ids, owner = np.zeros((2, count, size), np.int32)
    for r, row in enumerate(rows):
        ends = np.cumsum([len(tokens[number]) for number in row])
        ids[r, : ends[-1]] = np.concatenate([tokens[number] for number in row])
        owner[r, : ends[-1]] = np.repeat(np.arange(1, len(row) + 1), np.diff(ends, prepend=0))
    return ids, owner


def _encode(
    bert: Bert,
    tokens: Sequence[np.ndarray],
    rows: Sequence[Sequence[int]],
    size: int,
    batch_tokens: int,
    dtype: str,
    into: np.ndarray,
) -> None:
    """Write the vectors of the rows' texts to their places in `into`."""
    full = max(1, batch_tokens // size)
    # What is less than one batch takes the next power of two, so that one text is quickly done.
    count = full if len(rows) > full else min(full, 1 << (len(rows) - 1).bit_length())
    texts = size // SHORTEST
    run = functools.partial(_program, sizes=bert.sizes, texts=texts, dtype=dtype)
    for start in range(0, len(rows), count):
        part = rows[start : start + count]
        ids, owner = side_by_side(tokens, part, count, size)
        vectors = np.asarray(run(bert.params, ids, owner))
        for r, row in enumerate(part):
            into[list(row)] = vectors[r, : len(row)]
