"""Exact scoring by cosine or dot product, top-k and target ranks; needs JAX and NumPy only."""

from mtrec_jax.kernels.index import ItemIndex
from mtrec_jax.kernels.scoring import cosine_scores, cosine_topk, dot_topk, target_rank
from mtrec_jax.kernels.softmax import streaming_softmax_loss

__all__ = [
    "ItemIndex",
    "cosine_scores",
    "cosine_topk",
    "dot_topk",
    "streaming_softmax_loss",
    "target_rank",
]
