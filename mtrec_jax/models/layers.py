"""Small layers that the encoders and the towers share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key
from pydantic import Field

from mtrec_jax.mixing import mixed_bits

_Width = Annotated[int, Field(ge=1)]
Hidden = Annotated[tuple[_Width, ...], Field(min_length=1)]  # widths of hidden layers, in options
MaybeHidden = tuple[_Width, ...]


def dropout(x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None) -> Float[Array, "..."]:
    """Zero each entry with probability `rate`, rescale the rest; `key=None` leaves x as it is.

    The mask comes from `mixed_bits`: it does not depend on how x is split over devices.
    """
    if key is None or rate == 0:
        return x
    threshold = jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    return jnp.where(mixed_bits(x.shape, key) >= threshold, x / (1 - rate), 0)


class Dense(nnx.Linear):
    """A dense layer of vectors [..., in] as a matrix: of more axes, XLA copies the transposes that
    it sums the gradient of the kernel from, which takes several times as long on CPUs."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., out]."""
        rows = x.reshape(-1, x.shape[-1])
        return super().__call__(rows).reshape(*x.shape[:-1], self.out_features)


def linear(
    inputs: int,
    outputs: int,
    *,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
    compute: jnp.dtype | None = None,
) -> Dense:
    """A dense layer whose initial values are drawn on the host, without a compiled program; its
    product is taken in `compute`, which is `dtype` unless given."""
    return Dense(
        inputs,
        outputs,
        dtype=compute or dtype,
        param_dtype=dtype,
        kernel_init=lecun_normal,
        bias_init=constant(0.0),
        rngs=rngs,
    )


class LayerNorm(nnx.LayerNorm):
    """Layer normalisation (Ba et al. 2016) of vectors [..., D] as a matrix."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        rows = x.reshape(-1, x.shape[-1])
        given = jnp.asarray(self.scale[...]), jnp.asarray(self.bias[...])
        return _normalised(rows, *given).reshape(x.shape)


@jax.custom_vjp
def _normalised(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return _normalise(x, scale, bias)[0]


def _normalise(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, Any]:
    mean = jnp.mean(x, axis=1, keepdims=True)
    shrink = jax.lax.rsqrt(jnp.mean(jnp.square(x - mean), axis=1, keepdims=True) + 1e-6)
    return (x - mean) * shrink * scale[None] + bias[None], (x, mean, shrink, scale)


def _normalise_back(kept: Any, gradient: jax.Array) -> tuple[jax.Array, ...]:
    """Ba et al. 2016, section 3: what moves the mean or the variance has no effect."""
    x, mean, shrink, scale = kept
    unit, scaled = (x - mean) * shrink, gradient * scale[None]
    along = jnp.mean(scaled * unit, axis=1, keepdims=True)
    to_x = shrink * (scaled - jnp.mean(scaled, axis=1, keepdims=True) - unit * along)
    return to_x, jnp.sum(gradient * unit, axis=0), jnp.sum(gradient, axis=0)


_normalised.defvjp(_normalise, _normalise_back)


def layer_norm(size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> LayerNorm:
    """Layer normalisation."""
    given = {"scale_init": constant(1.0), "bias_init": constant(0.0)}
    return LayerNorm(size, dtype=dtype, param_dtype=dtype, rngs=rngs, **given)


def normal(
    rngs: nnx.Rngs, shape: tuple[int, ...], scale: float, dtype: jnp.dtype
) -> np.ndarray | jax.Array:
    """Normal initial values."""
    return _drawn(rngs.params(), shape, dtype, lambda rng: scale * rng.standard_normal(shape))


def signs(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: jnp.dtype) -> np.ndarray | jax.Array:
    """Initial values of 1 or -1, at random."""
    return _drawn(rngs.params(), shape, dtype, lambda rng: rng.choice([-1.0, 1.0], shape))


def lecun_normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Any:
    """Normal values of variance 1 / inputs, cut off at two standard deviations (as flax does)."""
    scale = shape[0] ** -0.5 / 0.87962566103423978  # so that the variance is right after the cut

    def draw(rng: np.random.Generator) -> np.ndarray:
        from scipy import special  # once a run, at its beginning

        low, high = special.ndtr([-2.0, 2.0])
        return scale * special.ndtri(rng.uniform(low, high, shape))

    return _drawn(key, shape, dtype, draw)


def constant(value: float) -> Callable[..., np.ndarray]:
    """The initial value of every entry."""
    return lambda key, shape, dtype: np.full(shape, value, dtype)


def sinusoids(shape: tuple[int, int], dtype: jnp.dtype) -> np.ndarray:
    """Initial values of places [S, D]: sines, then cosines of D / 2 lengths, from 2 pi places to
    10,000 times as many (Vaswani et al., NeurIPS 2017).

    >>> sinusoids((3, 2), jnp.dtype("float64")).round(2).tolist()
    [[0.0, 1.0], [0.84, 0.54], [0.91, -0.42]]
    """
    places, width = shape
    lengths = -(-width // 2)
    angles = np.outer(np.arange(places), 10_000.0 ** (-np.arange(lengths) / lengths))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :width].astype(dtype)


def _drawn(
    key: jax.Array,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    draw: Callable[[np.random.Generator], np.ndarray],
) -> Any:
    """Values of a generator that the key seeds; where the key is abstract, only their shape."""
    if isinstance(key, jax.core.Tracer):
        return jnp.zeros(shape, dtype)
    data = np.asarray(jax.random.key_data(getattr(key, "value", key)))
    return draw(np.random.default_rng(data.ravel().tolist())).astype(dtype)


def unit_length(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Vectors divided by their L2 norm; the zero vector stays zero, with a finite gradient.

    For training; `kernels` normalise with more care for the last bit.
    """
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


class MLP(nnx.Module):
    """Dense layers with SiLU between them: [..., in] -> [..., hidden[-1]], activated at the end."""

    def __init__(self, inputs: int, hidden: Sequence[int], *, dtype: jnp.dtype, rngs: nnx.Rngs):
        sizes = [inputs, *hidden]
        self.layers = nnx.List(
            [linear(a, b, dtype=dtype, rngs=rngs) for a, b in itertools.pairwise(sizes)]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = jax.nn.silu(layer(x))
        return x

    def behind(self, x: jax.Array) -> jax.Array:
        """The layers behind the first one."""
        for layer in list(self.layers)[1:]:
            x = jax.nn.silu(layer(x))
        return x


def product(x: Float[Array, "n in"], layers: Sequence[nnx.Linear]) -> Float[Array, "n out"]:
    """The outputs of dense layers with one input, side by side: one large product for many small
    ones."""
    kernels = jnp.concatenate([layer.kernel[...] for layer in layers], axis=1)
    biases = jnp.concatenate([layer.bias[...] for layer in layers])
    x, kernels, biases = (part.astype(layers[0].dtype) for part in (x, kernels, biases))
    return x @ kernels + biases[None]


class Experts(nnx.Module):
    """E independent MLPs on one input: [n, in] -> E times [n, hidden[-1]].

    With `normalise` each expert's output is divided by its root mean square and scaled (RMSNorm,
    Zhang & Sennrich, NeurIPS 2019), so that no expert outweighs the others by its size alone; the
    papers of MMoE, PLE and STEM have none. The first layers are one product, as they have one
    input; those behind are a product each: batched products of small matrices are slow on CPUs.
    """

    def __init__(
        self,
        count: int,
        inputs: int,
        hidden: Sequence[int],
        normalise: bool,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.mlps = nnx.List([MLP(inputs, hidden, dtype=dtype, rngs=rngs) for _ in range(count)])
        self.norms = nnx.List(
            [
                nnx.RMSNorm(
                    hidden[-1],
                    dtype=dtype,
                    param_dtype=dtype,
                    scale_init=constant(1.0),
                    rngs=rngs,
                )
                for _ in range(count * normalise)
            ]
        )

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        every = self.behind(product(x, self.firsts))
        return [part[:, 0] for part in jax.lax.split(every, [1] * every.shape[1], axis=1)]

    @property
    def firsts(self) -> list[nnx.Linear]:
        """The first layers, whose input is that of all experts."""
        return [mlp.layers[0] for mlp in self.mlps]

    def behind(self, firsts: Float[Array, "n E_times_first"]) -> Float[Array, "n E H"]:
        """The experts, given the product of their first layers."""
        h, count = jax.nn.silu(firsts), len(self.mlps)
        if len(self.mlps[0].layers) > 1:
            parts = jax.lax.split(h, [h.shape[1] // count] * count, axis=1)
            parts = [mlp.behind(part) for mlp, part in zip(self.mlps, parts, strict=True)]
            h = jnp.concatenate(parts, axis=1)
        width = h.shape[1] // count
        if not self.norms:
            return h.reshape(len(h), count, width)
        # Root mean squares, as products with ones: short sums are slow on CPUs.
        ones = np.kron(np.eye(count), np.ones((width, 1))).astype(h.dtype)  # (E * H, E)
        exact = jax.lax.Precision.HIGHEST
        square = jnp.matmul(h * h, ones, precision=exact) / width
        shrink = jax.lax.rsqrt(square + self.norms[0].epsilon)
        scale = jnp.concatenate([norm.scale[...] for norm in self.norms])
        h = h * jnp.matmul(shrink, ones.T, precision=exact) * scale[None]
        return h.reshape(len(h), count, width)


def mix(
    weights: Float[Array, "n E"], experts: Float[Array, "n E H"] | list[Float[Array, "n H"]]
) -> Float[Array, "n H"]:
    """Weighted sum of the experts' outputs, example by example."""
    if isinstance(experts, list):
        experts = jnp.stack(experts, axis=1)
    return jnp.sum(weights[:, :, None] * experts, axis=1)


class Thresholds(nnx.Module):
    """C - 1 thresholds in rising order: a score [...] to how far it is above each, [..., C - 1]."""

    def __init__(self, first: Sequence[float], *, dtype: jnp.dtype):
        gaps = np.log(np.expm1(np.diff(first)))  # which softplus undoes
        self.free = nnx.Param(jnp.asarray(np.append(first[:1], gaps), dtype))

    def __call__(self, score: jax.Array) -> jax.Array:
        free = self.free[...]
        gaps = jax.nn.softplus(free[1:])
        cuts = jnp.cumsum(jnp.concatenate([free[:1], gaps]))
        return score[..., None] - jnp.broadcast_to(cuts, (*score.shape, len(cuts)))


class TaskHeads(nnx.Module):
    """A tower and a head a task: T inputs [n, in] to logits [n] or [n, C], and the towers' ends."""

    def __init__(
        self,
        inputs: int,
        tasks: dict[str, int],
        hidden: Sequence[int],
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.names = tuple(tasks)
        self.towers = nnx.List([MLP(inputs, hidden, dtype=dtype, rngs=rngs) for _ in tasks])
        last = hidden[-1] if hidden else inputs
        self.heads = nnx.List(
            [linear(last, outputs, dtype=dtype, rngs=rngs) for outputs in tasks.values()]
        )

    def __call__(
        self, mixed: Sequence[jax.Array]
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """`mixed` holds each task's input, in order -> logits, hidden."""
        logits, hidden = {}, {}
        for t, name in enumerate(self.names):
            hidden[name] = self.towers[t](mixed[t])
            out = self.heads[t](hidden[name])
            logits[name] = out[:, 0] if out.shape[1] == 1 else out
        return logits, hidden
