"""Texts as vectors, by a BERT that somebody else has trained."""

from mtrec_jax.models.text.bert import Bert, BertSizes, encode, encode_packed, load_bert
from mtrec_jax.models.text.vectors import cached_text_vectors, text_vectors

__all__ = [
    "Bert",
    "BertSizes",
    "cached_text_vectors",
    "encode",
    "encode_packed",
    "load_bert",
    "text_vectors",
]
