"""Vectors of texts: against an implementation in NumPy, one text at a time, and against another
library's on real weights and titles; weights that events train further."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import special

import mtrec_jax
from mtrec_jax.data import features
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.data.features import Text
from mtrec_jax.data.prepare import up_to_date
from mtrec_jax.data.shop import CATEGORIES
from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.models.inputs import make_inputs
from mtrec_jax.models.text import (
    Bert,
    cached_text_vectors,
    encode,
    encode_packed,
    load_bert,
    text_vectors,
)
from mtrec_jax.models.text.bert import save_bert
from mtrec_jax.types import FIRST
from tests.data import small

REASON = "vectors of texts come with: pip install 'mtrec_jax[text]'"
tokenizers = pytest.importorskip("tokenizers", reason=REASON)
safetensors = pytest.importorskip("safetensors.numpy", reason=REASON)

DATA = Path(os.environ.get("MTREC_TESTS_DATA", "data"))  # public data that was fetched before
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnop", *CATEGORIES]
LAYERS, HEADS, WIDTH, HIDDEN, POSITIONS = 2, 2, 8, 12, 150
CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "vocab_size": len(WORDS),
    "max_position_embeddings": POSITIONS,
    "layer_norm_eps": 1e-12,
}
TEXTS = ["a b c", "", "d", "a b c", "unheard e", " ".join("abcdefgh" * 9), " ".join("ponm" * 50)]


def arrays() -> dict[str, np.ndarray]:
    """Random weights under the names of the field, dense ones [out, in], with what is not read."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    found = {
        "embeddings.word_embeddings.weight": normal(len(WORDS), WIDTH),
        "embeddings.position_embeddings.weight": normal(POSITIONS, WIDTH),
        "embeddings.token_type_embeddings.weight": normal(2, WIDTH),
        "embeddings.position_ids": np.arange(POSITIONS)[None],
        "pooler.dense.weight": normal(WIDTH, WIDTH),
        "pooler.dense.bias": normal(WIDTH),
    }
    dense: dict[str, tuple[int, int]] = {}
    norms = ["embeddings.LayerNorm"]
    for n in range(LAYERS):
        at = f"encoder.layer.{n}"
        inner = [f"attention.self.{name}" for name in ("query", "key", "value")]
        dense |= {f"{at}.{name}": (WIDTH, WIDTH) for name in (*inner, "attention.output.dense")}
        dense |= {
            f"{at}.intermediate.dense": (HIDDEN, WIDTH),
            f"{at}.output.dense": (WIDTH, HIDDEN),
        }
        norms += [f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"]
    for name, shape in dense.items():
        found |= {f"{name}.weight": normal(*shape) / 4, f"{name}.bias": normal(shape[0]) / 4}
    for name in norms:
        found |= {f"{name}.weight": 1 + normal(WIDTH) / 4, f"{name}.bias": normal(WIDTH)}
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of weights, whose tokenizer cuts and pads to 8 as that of the real ones to 128."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    safetensors.save_file(arrays(), tmp_path / "model.safetensors")
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.enable_truncation(8)
    made.enable_padding(length=8)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def numpy_vector(words: str, length: int = POSITIONS) -> np.ndarray:
    """The vector of a text, in float64 and as the papers have it: post-norm layers, heads one by
    one, the mean of the states at length 1."""
    w = {name: array.astype(np.float64) for name, array in arrays().items()}
    known = [WORDS.index(word) if word in WORDS else 1 for word in words.split()]
    ids = [2, *known[: length - 2], 3]

    def dense(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-12)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["embeddings.word_embeddings.weight"][ids]
    x = x + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for n in range(LAYERS):
        at, parts = f"encoder.layer.{n}", []
        q, k, v = (dense(x, f"{at}.attention.self.{name}") for name in ("query", "key", "value"))
        for one in np.split(np.arange(WIDTH), HEADS):
            scores = q[:, one] @ k[:, one].T / np.sqrt(WIDTH / HEADS)
            parts.append(special.softmax(scores, axis=1) @ v[:, one])
        mixed = dense(np.concatenate(parts, axis=1), f"{at}.attention.output.dense")
        x = norm(x + mixed, f"{at}.attention.output.LayerNorm")
        hidden = dense(x, f"{at}.intermediate.dense")
        hidden = hidden * (1 + special.erf(hidden / np.sqrt(2))) / 2
        x = norm(x + dense(hidden, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    mean = x.mean(axis=0)
    return mean / np.linalg.norm(mean)


def test_vectors_are_those_of_numpy(folder: Path) -> None:
    """Short texts share a row, longer ones have rows of 128 and 256, equal ones are one; the
    longest is cut at the model's 150 positions, and the tokenizer's own 8 do not count."""
    seen: list[tuple[int, int]] = []
    found = text_vectors(TEXTS, load_bert(folder), progress=lambda *at: seen.append(at))
    np.testing.assert_allclose(found, [numpy_vector(text) for text in TEXTS], atol=2e-6)
    assert found.dtype == np.float32
    assert seen == [(6, 6)]


@pytest.mark.parametrize("batch_tokens", [1, 128, 4096])
def test_a_text_has_its_vector_whatever_stands_beside_it(folder: Path, batch_tokens: int) -> None:
    """More texts than a batch and a row take, in any order."""
    rng, made = np.random.default_rng(1), load_bert(folder)
    texts = [" ".join(rng.choice(WORDS[4:], n)) for n in rng.integers(0, 30, 60)]
    found = text_vectors(texts, made, batch_tokens)
    for place in (0, 7, 59):
        np.testing.assert_allclose(found[place], numpy_vector(texts[place]), atol=2e-6)
    np.testing.assert_allclose(text_vectors(texts[::-1], made)[::-1], found, atol=2e-6)
    assert text_vectors([], made).shape == (0, WIDTH)


def test_padding_changes_nothing_and_a_row_of_it_is_zero(folder: Path) -> None:
    made = load_bert(folder)
    ids, mask = np.full((2, 9), 7, np.int32), np.zeros((2, 9), bool)
    (ids[0, :5],), mask[0, :5] = made.tokens(["a b c"]), True
    found = encode(made.params, jnp.asarray(ids), jnp.asarray(mask), made.sizes)
    np.testing.assert_allclose(found, [numpy_vector("a b c"), np.zeros(WIDTH)], atol=2e-6)


def test_bfloat16_is_close(folder: Path) -> None:
    """Its products have 8 bits: cosines of .99 and more, and not the float32 vector itself."""
    made = load_bert(folder)
    exact, found = (text_vectors(TEXTS, made, dtype=d) for d in ("float32", "bfloat16"))
    assert np.sum(exact * found, axis=1).min() > 0.99
    assert np.abs(exact - found).max() > 1e-5


def test_the_gradient_is_that_of_differences(folder: Path) -> None:
    """Through two texts of a row beside padding, by words and kernels, along the steepest way."""
    made = load_bert(folder)
    first, second = made.tokens(["a b", "c"])
    ids = jnp.asarray(np.concatenate([first, second, [0]]))[None]
    owner = jnp.asarray([[1] * len(first) + [2] * len(second) + [0]])

    def loss(params: Any) -> jax.Array:
        vectors = encode_packed(params, ids, owner, made.sizes, 3)
        return jnp.sum(vectors[0, 0, :4]) - vectors[0, 1, 5] + jnp.sum(vectors[0, 2])

    value, gradient = jax.jit(loss), jax.jit(jax.grad(loss))(made.params)
    assert all(bool(jnp.isfinite(part).all()) for part in jax.tree.leaves(gradient))
    for name in ("words", "qkv", "down"):
        part = made.params if name in made.params else made.params["layers"]
        slopes = (gradient if name in made.params else gradient["layers"])[name]
        steepest = float(jnp.linalg.norm(slopes))
        ends = []
        for by in (0.01, -0.01):
            changed = part | {name: part[name] + by * slopes / steepest}
            whole = changed if name in made.params else made.params | {"layers": changed}
            ends.append(float(value(whole)))
        assert steepest > 0.01, name
        np.testing.assert_allclose((ends[0] - ends[1]) / 0.02, steepest, rtol=0.02)


def test_weights_are_found_in_an_unpacked_wheel(folder: Path, tmp_path: Path) -> None:
    """And float16 arrays under a prefix are read as well, with the length that the folder says."""
    inside = tmp_path / "wheel" / "package" / "model"
    inside.mkdir(parents=True)
    halves = {f"bert.{name}": array.astype(np.float16) for name, array in arrays().items()}
    safetensors.save_file(halves, inside / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        (inside / name).write_bytes((folder / name).read_bytes())
    (inside / "sentence_bert_config.json").write_text('{"max_seq_length": 5}')
    (inside / "1_Pooling").mkdir()
    (inside / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    found = text_vectors(["a b c d e f"], load_bert(tmp_path / "wheel"))
    np.testing.assert_allclose(found[0], numpy_vector("a b c d e f", length=5), atol=0.02)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def with_text(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return write


def with_config(**changes: Any) -> Callable[[Path], None]:
    return with_text("config.json", json.dumps(CONFIG | changes))


def with_array(name: str, array: np.ndarray | None) -> Callable[[Path], None]:
    changed = {key: of for key, of in (arrays() | {name: array}).items() if of is not None}
    return lambda folder: safetensors.save_file(changed, folder / "model.safetensors")


def with_one_more_token(folder: Path) -> None:
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.add_tokens(["q"])
    made.save(str(folder / "tokenizer.json"))


UP = "encoder.layer.1.intermediate.dense.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("tokenizer.json"), "there is no tokenizer.json.*mtrec data all-minilm-l6-v2"),
        (with_text("config.json", "{"), r"config\.json: cannot be read as JSON"),
        (with_config(model_type="roberta"), "model_type is 'roberta'; this encoder knows 'bert'"),
        (with_config(hidden_act="gelu_new"), "hidden_act is 'gelu_new'"),
        (with_config(position_embedding_type="relative_key"), "knows 'absolute' alone"),
        (with_config(num_attention_heads=3), "hidden_size 8 is no multiple of the 3 heads"),
        (with_config(hidden_size=None), "hidden_size is None, not a whole number"),
        (with_config(layer_norm_eps="small"), "layer_norm_eps is 'small'"),
        (with_config(num_hidden_layers=3), r"no array encoder\.layer\.2\.attention\.self\.query"),
        (with_array(UP, None), rf"there is no array {UP}"),
        (
            with_array(UP, np.ones((8, 12), np.float32)),
            r"dense.weight is \[8, 12\], but .* \[12, 8\]",
        ),
        (with_text("model.safetensors", "no weights"), r"model\.safetensors: cannot be read"),
        (with_text("tokenizer.json", "{}"), r"tokenizer\.json: cannot be read"),
        (with_one_more_token, "it has 29 tokens, but the model has 28"),
        (with_text("sentence_bert_config.json", '{"max_seq_length": 151}'), "has 150 positions"),
        (with_text("1_Pooling/config.json", '{"pooling_mode_cls_token": true}'), "cls_token"),
        (with_text("modules.json", '[{"type": "models.Dense"}]'), "there is a module Dense"),
    ],
)
def test_other_weights_are_refused(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    with pytest.raises(DataError, match=message):
        load_bert(folder)


def test_a_folder_without_weights_says_how_to_fetch_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder of weights; fetch weights with: mtrec"):
        load_bert(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"there is no config\.json, no model\.safetensors"):
        load_bert(tmp_path)


def test_without_the_libraries_the_extra_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ConfigError, match=r"need safetensors.*pip install 'mtrec_jax\[text\]'"):
        load_bert(folder)


def test_wrong_arguments_are_named(folder: Path) -> None:
    made = load_bert(folder)
    with pytest.raises(DataError, match=r"texts\[1\]: None is no text; pass \"\""):
        text_vectors(["a", None], made)
    with pytest.raises(DataError, match="batch_tokens = 0"):
        text_vectors(["a"], made, 0)
    with pytest.raises(ConfigError, match="dtype: 'float16' is not one of"):
        text_vectors(["a"], made, dtype="float16")


def test_vectors_are_kept_until_texts_or_weights_change(folder: Path, tmp_path: Path) -> None:
    """What is kept is read, shown by a mark in the file; what differs is made anew, also where the
    texts are the same in another order or cut at other places."""
    path, texts = tmp_path / "kept" / "titles.parquet", ["a b", "c", "d"]
    exact = np.stack([numpy_vector(text) for text in texts])

    def marked() -> None:
        table = pq.read_table(path)
        vectors = np.zeros((table.num_rows, WIDTH), np.float32)
        vectors[:, 0] = 2
        column = table.schema.field("vector").type
        assert column.list_size == WIDTH
        changed = as_table(vectors, column)
        pq.write_table(changed.replace_schema_metadata(table.schema.metadata), path)

    np.testing.assert_allclose(cached_text_vectors(texts, folder, path), exact, atol=2e-6)
    assert [f.name for f in path.parent.iterdir()] == ["titles.parquet"]
    marked()
    assert (cached_text_vectors(texts, folder, path)[:, 0] == 2).all()
    for others in (["c", "a b", "d"], ["a", "b c", "d"], ["a b", "c"]):
        marked()
        found = cached_text_vectors(others, folder, path)
        np.testing.assert_allclose(found, [numpy_vector(text) for text in others], atol=2e-6)
    cached_text_vectors(texts, folder, path)
    marked()
    with_text("sentence_bert_config.json", '{"max_seq_length": 3}')(folder)
    found = cached_text_vectors(texts, folder, path)
    np.testing.assert_allclose(found, [numpy_vector(text, 3) for text in texts], atol=2e-6)
    for _ in range(2):
        assert cached_text_vectors([], folder, path.with_name("none.parquet")).shape == (0, WIDTH)
    path.write_bytes(path.read_bytes()[:100])
    assert (cached_text_vectors(texts, folder, path) == found).all()


def as_table(vectors: np.ndarray, column: Any) -> Any:
    flat = pa.array(vectors.reshape(-1))
    return pa.table({"vector": pa.FixedSizeListArray.from_arrays(flat, type=column)})


# --- As a feature


def test_texts_are_inputs_of_items(folder: Path, shop_data: Path, tmp_path: Path) -> None:
    """They stand beside the price, as numbers that belong together; other weights under the same
    name make another folder, and a text without an encoder is no input."""
    base = mtrec_jax.load_experiment("shop")
    words = {
        "words": Text(on="item", column="title", encoder=str(folder)),
        "kept": Text(on="item", column="title"),
    }
    experiment = dataclasses.replace(base, features=dict(base.features) | words)
    prepared = mtrec_jax.prepare(experiment, shop_data, tmp_path / "prepared")
    titles = prepared.items["title"].to_pylist()
    assert prepared.items["text_kept"].to_pylist() == titles
    numbers = prepared.catalogue()["numbers"][FIRST:]
    assert [(f.name, f.slots) for f in prepared.manifest.item_numbers] == [
        ("price", 1),
        ("words", WIDTH),
    ]
    expected = np.stack([numpy_vector(title) * WIDTH**0.5 for title in titles])
    assert len(np.unique(expected.round(3), axis=0)) > 5
    np.testing.assert_allclose(numbers[:, 1:], expected, atol=1e-5)
    inputs = make_inputs(experiment, prepared.manifest)
    assert inputs.numbers["item"] == (1, WIDTH)
    assert inputs.coded["item"] == (False, True)
    assert up_to_date(experiment, shop_data, tmp_path / "prepared") is not None
    with_array(UP, np.ones((HIDDEN, WIDTH), np.float32))(folder)
    assert up_to_date(experiment, shop_data, tmp_path / "prepared") is None


def test_a_missing_text_is_zero_and_a_list_is_one_text(folder: Path) -> None:
    feature = Text(on="item", encoder=str(folder))
    cells = pa.array([["a", "b"], None, [], ["a b", None]])
    fitted = features.fit("words", feature, cells, np.ones(4, np.int64))
    expected = np.zeros((4, WIDTH))
    expected[[0, 3]] = numpy_vector("a b") * WIDTH**0.5
    np.testing.assert_allclose(features.encode(fitted, cells), expected, atol=1e-5)


def test_vectors_are_of_items_alone() -> None:
    with pytest.raises(ConfigError, match=r"features\.bio\.encoder: vectors are made of the texts"):
        mtrec_jax.load_experiment(
            "shop", ['features.bio={ kind = "text", on = "context", encoder = "x" }']
        )


# --- Fine-tuned


def walks(folder: Path, **sections: Any) -> Prepared:
    """80 users of 8 events; behind item 2 n comes 2 n + 1, of which the titles say nothing."""
    rng, number = np.random.default_rng(2), np.arange(24)
    titles = [" ".join(WORDS[4 + place] for place in rng.permutation(16)[:3]) for _ in number]
    text = "user,item,time\n"
    for user in range(80):
        pairs = 2 * rng.permutation(12)[:4]
        taken = np.stack([pairs, pairs + 1], axis=1).reshape(-1)
        text += "".join(f"u{user},i{item},{at}\n" for at, item in enumerate(np.roll(taken, -1)))
    items = "item,title\n" + "".join(f"i{n},{title}\n" for n, title in enumerate(titles))
    data = {"items": {"files": ["items.csv"]}, "title": "title"}
    return small.run(folder, small.make(data=data, **sections), text, items_csv=items)


def test_texts_of_items_that_follow_each_other_come_close(folder: Path, tmp_path: Path) -> None:
    """The next title of held-out pairs becomes the nearest; the new folder is one of weights, whose
    other arrays are those of the old one; the same call makes the same bytes."""
    (tmp_path / "log").mkdir()
    prepared, losses = walks(tmp_path / "log"), list[float]()
    settings: dict[str, Any] = {"steps": 120, "batch_size": 64, "learning_rate": 0.01}
    found = mtrec_jax.fine_tune(
        prepared, folder, tmp_path / "new", **settings, progress=lambda _, x: losses.append(x)
    )
    assert (found.pairs, len(losses)) == (400, 120)
    assert found.before is not None
    assert found.after is not None
    assert found.before < 0.1
    assert found.after > 0.3
    old, new = load_bert(folder), load_bert(tmp_path / "new")
    assert new.sizes == old.sizes
    assert new.tokens(["a b"])[0].tolist() == [2, 4, 5, 3]
    titles = prepared.items["title"].to_pylist()
    vectors = text_vectors(titles, new)
    first, second = (
        vectors[[prepared.item_names.index(f"i{n}") for n in range(start, 24, 2)]]
        for start in (0, 1)
    )
    assert np.mean(np.argmax(first @ second.T, axis=1) == np.arange(12)) > 0.3
    before, after = (safetensors.load_file(f / "model.safetensors") for f in (folder, found.folder))
    assert list(before) == list(after)
    for name in ("pooler.dense.weight", "embeddings.position_ids"):
        np.testing.assert_array_equal(after[name], before[name])
    mtrec_jax.fine_tune(prepared, folder, tmp_path / "again", **settings)
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == (tmp_path / "new" / "model.safetensors").read_bytes()


def test_weights_written_without_training_are_the_old_ones(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    save_bert(load_bert(folder), folder, tmp_path / "new")
    for name, array in safetensors.load_file(tmp_path / "new" / "model.safetensors").items():
        np.testing.assert_allclose(array, arrays()[name], atol=1e-6, err_msg=name)


def test_weights_of_one_split_are_refused_for_another(folder: Path, tmp_path: Path) -> None:
    """Of the same files. With the same split, or allowed, they are taken; so is who asks anew."""
    (tmp_path / "log").mkdir()
    prepared = walks(tmp_path / "log")
    tuned = tmp_path / "tuned"
    mtrec_jax.fine_tune(prepared, folder, tuned, steps=1, batch_size=8)
    words = {"on": "item", "kind": "text", "column": "title", "encoder": str(tuned)}
    assert walks(tmp_path / "log", features={"words": words}).manifest.item_numbers
    other = {"split": {"kind": "cold_item"}, "features": {"words": words}}
    with pytest.raises(
        DataError, match=r"features\.words\.encoder: .*another split .*leave_one_out"
    ):
        walks(tmp_path / "log", **other)
    assert walks(tmp_path / "log", guard={"allow": ["words"]}, **other).manifest.item_numbers


def test_what_cannot_be_fine_tuned(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    prepared = walks(tmp_path / "log")
    for wrong, message in (
        ({"column": "story"}, "column= 'story': .* has no such texts of items; it has title"),
        ({"batch_size": 512}, "400 pairs of items .* fewer than the 512 of a batch"),
        ({"learning_rate": 0.0}, "learning_rate= 0.0: between 0 and 1"),
        ({"steps": 0}, "steps = 0: between 1"),
    ):
        with pytest.raises((DataError, ConfigError), match=message):
            mtrec_jax.fine_tune(prepared, folder, tmp_path / "new", **wrong)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(DataError, match=r"no folder of fine-tuned weights \(no tuned_on\.json\)"):
        mtrec_jax.fine_tune(prepared, folder, tmp_path / "mine")


# --- Real weights


@pytest.fixture(scope="module")
def minilm() -> Bert:
    folder = DATA / "all-minilm-l6-v2"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: mtrec data all-minilm-l6-v2 --to {DATA}, or MTREC_TESTS_DATA")
    return load_bert(folder)


def test_real_vectors_are_those_of_another_library(minilm: Bert) -> None:
    """200 titles against Transformers on PyTorch, as `scripts/minilm_reference.py` has written it:
    the first 8 numbers, and the products with 16 directions of the cosine transform."""
    file = DATA / "ml-1m" / "ml-1m.item"
    if not file.is_file():
        pytest.skip(f"no {file}: mtrec data ml-1m --to {DATA}, or MTREC_TESTS_DATA")
    lines = file.read_text("utf-8").splitlines()[1:201]
    found = text_vectors([line.split("\t")[1] for line in lines], minilm)
    places = (np.arange(384) + 0.5)[:, None] * np.pi / 384
    directions = np.sqrt(2 / 384) * np.cos(places * np.arange(1, 384, 24)[None])
    kept = np.concatenate([found[:, :8], found @ directions], axis=1)
    expected = np.load(Path(__file__).with_name("minilm_titles.npy"))
    assert expected.std() > 0.03
    np.testing.assert_allclose(kept, expected, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_real_vectors_say_what_texts_mean(minilm: Bert) -> None:
    """Of a text's own words none is in the one that is nearest to it."""
    asked, near, far = text_vectors(
        ["a puppy sleeps on the couch", "dogs resting at home", "quarterly revenue of a bank"],
        minilm,
    )
    assert asked @ near > 0.4 > 0.2 > asked @ far
