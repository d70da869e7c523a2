"""`mtrec doctor`: what a bug report begins with."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
from typing import Annotated, Any

import typer

_VARIABLES = ("JAX_", "XLA_", "MTREC_", "OMP_", "OPENBLAS_", "MKL_", "CUDA_VISIBLE", "XDG_CACHE")


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="For programs instead of people.")
    ] = False,
) -> None:
    """Versions, devices, threads, memory, cache folder, and what is missing for which extra.

    A bug report begins with it: `mtrec doctor --json > doctor.json`.
    """
    report = examine()
    if as_json:
        typer.echo(json.dumps(report, indent=1))
        return
    for title, values in report.items():
        typer.echo(title if values else f"{title}: nothing set")
        for name, value in values.items():
            typer.echo(f"  {name:22} {_shown(value)}")


def examine() -> dict[str, dict[str, Any]]:
    """The report as {title: {name: JSON-able value}}; what is broken is said, not raised."""
    parts = {
        "versions": _versions,
        "devices": _devices,
        "processor": _processor,
        "memory": _memory,
        "compiled programs": _cache,
        "packages": _packages,
        "environment": _environment,
    }
    report = {}
    for title, part in parts.items():
        try:
            report[title] = part()
        except Exception as error:  # a broken installation is what it is asked about
            report[title] = {"failed": f"{type(error).__name__}: {error}"}
    return report


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    return "no limit" if value is None else str(value)


def _versions() -> dict[str, Any]:
    import mtrec_jax

    found = {"mtrec_jax": mtrec_jax.__version__, "Python": platform.python_version()}
    found["system"] = platform.platform()
    names = {_requirement(text).name for text in _requires("mtrec_jax", "")} | {"jaxlib", "duckdb"}
    return found | {name: _version(name) or "not installed" for name in sorted(names)}


def _devices() -> dict[str, Any]:
    import jax

    devices = jax.devices()
    found: dict[str, Any] = {"platform": devices[0].platform, "count": len(devices)}
    found["kinds"] = sorted({device.device_kind for device in devices})
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        found["memory of the first"] = _gigabytes(stats["bytes_limit"])
    return found


def _processor() -> dict[str, Any]:
    from mtrec_jax import machine

    found: dict[str, Any] = {"cores": os.cpu_count(), "threads here": machine.threads()}
    found["container's limit"] = machine.cpu_quota()
    try:
        pools = importlib.import_module("threadpoolctl").threadpool_info
    except ImportError:
        return found | {"BLAS": "unknown: pip install threadpoolctl"}
    importlib.import_module("numpy")
    blas = [pool for pool in pools() if pool["user_api"] == "blas"]
    found["BLAS"] = [
        f"{pool['internal_api']} {pool['version']} {pool.get('architecture', '')} "
        f"with {pool['num_threads']} threads"
        for pool in blas
    ]
    return found


def _memory() -> dict[str, Any]:
    from mtrec_jax import machine

    return {
        "machine": _gigabytes(machine.machine_memory()) or "unknown",
        "container's limit": _gigabytes(machine.memory_limit()),
    }


def _cache() -> dict[str, Any]:
    import jax

    from mtrec_jax.compilation import cache_home, cache_limit, cache_size

    own = jax.config.values["jax_compilation_cache_dir"]
    if own is not None:
        return {"folder": own, "state": "chosen by JAX's own setting"}
    home = cache_home()
    if home is None:
        return {"state": "off (MTREC_CACHE)"}
    there = next(folder for folder in (home, *home.parents) if folder.exists())
    state = "in use" if os.access(there, os.W_OK) else f"{there} cannot be written: not in use"
    found = {"folder": str(home), "state": state}
    return found | {"size": _gigabytes(cache_size(home)), "limit": _gigabytes(cache_limit())}


def _environment() -> dict[str, Any]:
    return {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_VARIABLES)}


def _packages() -> dict[str, Any]:
    """For the package itself and each extra: "complete", or what is missing and what helps."""
    extras = importlib.metadata.metadata("mtrec_jax").get_all("Provides-Extra") or []
    found = {}
    for extra in ("", *extras):
        missing = sorted(set(_missing("mtrec_jax", extra)))
        name = f"mtrec_jax[{extra}]" if extra else "mtrec_jax"
        found[name] = (
            f'missing {", ".join(missing)}: pip install "{name}"' if missing else "complete"
        )
    return found


def _missing(package: str, extra: str) -> list[str]:
    """What an extra of a package needs and is not here, or in another version."""
    found = []
    for text in _requires(package, extra):
        needed = _requirement(text)
        version = _version(needed.name)
        if version is None:
            found.append(needed.name)
        elif not needed.specifier.contains(version, prereleases=True):
            found.append(f"{needed.name}{needed.specifier} (here {version})")
        else:
            for further in needed.extras:
                found += _missing(needed.name, further)
    return found


def _requires(package: str, extra: str) -> list[str]:
    """Requirements on this machine: of an extra alone, or without any extra ("")."""

    def needs(text: str, extra: str) -> bool:
        marker = _requirement(text).marker
        return marker is None or marker.evaluate({"extra": extra})

    texts = importlib.metadata.requires(package) or []
    return [t for t in texts if needs(t, extra) and (not extra or not needs(t, ""))]


def _requirement(text: str) -> Any:
    return importlib.import_module("packaging.requirements").Requirement(text)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gigabytes(size: int | None) -> str | None:
    return None if size is None else f"{size / 1e9:.2f} GB"
