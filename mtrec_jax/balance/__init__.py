"""Balancing of tasks: which gradient the tasks of a step make together. A file a method.

A method is a frozen dataclass of options with `make(weights) -> Balancer`; the dictionary below
names all that there are.
"""

from __future__ import annotations

from mtrec_jax.balance.cagrad import CAGrad
from mtrec_jax.balance.contract import Balancer, Gradients, Pullback
from mtrec_jax.balance.dbmtl import DBMTL
from mtrec_jax.balance.dwa import DWA
from mtrec_jax.balance.famo import FAMO
from mtrec_jax.balance.gradnorm import GradNorm
from mtrec_jax.balance.pcgrad import PCGrad
from mtrec_jax.balance.static import Static
from mtrec_jax.balance.uncertainty import Uncertainty

BALANCERS = {
    "static": Static,
    "uncertainty": Uncertainty,
    "dwa": DWA,
    "famo": FAMO,
    "gradnorm": GradNorm,
    "pcgrad": PCGrad,
    "cagrad": CAGrad,
    "dbmtl": DBMTL,
}

__all__ = ["BALANCERS", "Balancer", "Gradients", "Pullback"]
