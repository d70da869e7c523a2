"""What a deep model has to beat, as plain functions on arrays of training interactions.

Every module has `fit(...) -> model` (a frozen dataclass of arrays) and `scorer(model, histories)`,
whose result scores blocks of the catalogue as `mtrec_jax.evaluation.protocol.Scorer` asks.
`users` and `items` are ids as in `Prepared.interactions`: 0 padding, 1 unknown, real ids from 2.
Scores are by catalogue index, that is item id - 2.
"""
