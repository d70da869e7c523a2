"""Encoders of behaviour: tokens in time order to the user's states. A file each.

An encoder is a frozen dataclass of options with `make`, see `contract`; the dictionary below names
all that there are.
"""

from __future__ import annotations

from mtrec_jax.models.encoders.bert4rec import BERT4Rec
from mtrec_jax.models.encoders.contract import Behaviour, EncoderSizes
from mtrec_jax.models.encoders.gru import GRU
from mtrec_jax.models.encoders.hstu import HSTU
from mtrec_jax.models.encoders.mean import Mean
from mtrec_jax.models.encoders.none import NoEncoder
from mtrec_jax.models.encoders.transformer import Transformer

ENCODERS = {
    "none": NoEncoder,
    "transformer": Transformer,
    "bert4rec": BERT4Rec,
    "hstu": HSTU,
    "gru": GRU,
    "mean": Mean,
}

__all__ = ["ENCODERS", "Behaviour", "EncoderSizes"]
