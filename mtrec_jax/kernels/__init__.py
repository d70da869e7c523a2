"""Exact cosine scoring, top-k and target ranks; needs JAX and NumPy only."""

from mtrec_jax.kernels.scoring import cosine_scores, cosine_topk, target_rank

__all__ = ["cosine_scores", "cosine_topk", "target_rank"]
