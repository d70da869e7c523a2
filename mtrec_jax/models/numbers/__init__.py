"""Numbers on their way into the model: as they are, or embedded feature by feature. A file each.

How numbers are taken is a frozen dataclass of options with `make`, see `contract`; the dictionary
below names all ways that there are.
"""

from __future__ import annotations

from mtrec_jax.models.numbers.contract import NumberSizes
from mtrec_jax.models.numbers.linear import LinearNumbers
from mtrec_jax.models.numbers.periodic import PeriodicNumbers
from mtrec_jax.models.numbers.plain import PlainNumbers

NUMBERS = {
    "plain": PlainNumbers,
    "linear": LinearNumbers,
    "periodic": PeriodicNumbers,
}

__all__ = ["NUMBERS", "NumberSizes"]
