"""One page of the results that are kept in docs/benchmarks."""


def write() -> None: ...
