"""`mtrec recommend` and `predict`: what a trained run is for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mtrec_jax.cli.options import MovedFolder, NewEvents, NewUsers, RunFolder, say


def recommend(
    run: RunFolder,
    users: Annotated[list[str] | None, typer.Option(help="Raw user ids.")] = None,
    more_users: Annotated[list[str] | None, typer.Argument(help="Further user ids.")] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="Items a user, or all that are left.")] = 10,
    all_users: Annotated[bool, typer.Option("--all-users", help="Every user in the data.")] = False,
    out: Annotated[Path | None, typer.Option(help="A .csv, .jsonl or .parquet file.")] = None,
    blocked: Annotated[
        list[str] | None, typer.Option(help="Item id never to show; repeat it.")
    ] = None,
    allowed: Annotated[
        list[str] | None, typer.Option(help="Item id to choose from; repeat it.")
    ] = None,
    blocked_file: Annotated[
        Path | None,
        typer.Option(help="Ids never to show: one a line, or a table with the column of items."),
    ] = None,
    allowed_file: Annotated[
        Path | None, typer.Option(help="Ids to choose from, in such a file.")
    ] = None,
    allowed_by_user: Annotated[
        Path | None,
        typer.Option(help="A table with the columns of users and items: what each may get."),
    ] = None,
    at_most: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN=NUMBER", help="Most items of one author: author=2. May be repeated."
        ),
    ] = None,
    request: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="What is known of the moment, as hour=20 or asked=1700000000; repeat it.",
        ),
    ] = None,
    exclude_seen: Annotated[
        bool,
        typer.Option("--exclude-seen/--include-seen", help="Leave out what the user has seen."),
    ] = True,
    order_by: Annotated[
        str,
        typer.Option(
            metavar="TASK",
            help="Put items in order by this task's prediction, or by 'fused'; by default by what "
            "was worth most on validation.",
        ),
    ] = "chosen",
    diversify: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="Lists whose items differ: mmr, dpp, a table such as {kind='mmr', trade=0.5}, or "
            "none; by default what evaluate.diversify of the run says.",
        ),
    ] = "configured",
    unknown_items: Annotated[
        Literal["ignore", "error"],
        typer.Option(help="Ids of the filters that are not in the catalogue: count them, or stop."),
    ] = "ignore",
    new_items: Annotated[
        bool,
        typer.Option("--new-items/--no-new-items", help="Show items that have never trained."),
    ] = True,
    prepared: MovedFolder = None,
    events: NewEvents = None,
    profiles: NewUsers = None,
) -> None:
    """Recommend items to users: `mtrec recommend runs/ml-1m --users 1m_1 1m_2 --k 5`."""
    from mtrec_jax.experiments import cut

    if more_users and (not users or blocked or allowed):
        raise typer.BadParameter(
            f"unexpected {' '.join(more_users)}: repeat the option for each id, as in "
            "--users u1 --users u2 --blocked i1 --blocked i2"
        )
    chosen = list(dict.fromkeys([*(users or []), *(more_users or [])]))
    _check_who(chosen, all_users, out)
    recommender = _opened(run, prepared, events, profiles)
    filters = _filters(recommender, allowed, allowed_file, blocked, blocked_file, unknown_items)
    filters |= _by_user(recommender, allowed_by_user, filters) | {"at_most": _quotas(at_most)}
    filters |= {"k": k, "exclude_seen": exclude_seen, "order_by": order_by, "new_items": new_items}
    filters["request"] = dict(cut(text, "request") for text in request or [])
    filters["diversify"] = cut(f"diversify={diversify}")[1]  # a kind, or a table
    rows = _written(recommender, chosen, out, filters)
    if out is not None:
        shown = "none" if filters["at_most"] else filters["diversify"]
        order = recommender.order(order_by, shown)
        say(f"{rows:,} recommendations in {out}; {order}")
    if rows < k * (len(chosen) or recommender.prepared.manifest.users):
        _say_fewer(k, exclude_seen)


def interests(
    run: RunFolder,
    users: Annotated[list[str] | None, typer.Option(help="Raw user ids.")] = None,
    more_users: Annotated[list[str] | None, typer.Argument(help="Further user ids.")] = None,
    out: Annotated[Path | None, typer.Option(help="A .csv, .jsonl or .parquet file.")] = None,
    prepared: MovedFolder = None,
    events: NewEvents = None,
) -> None:
    """Say what each interest of users is: `mtrec interests runs/ml-1m --users 1m_1 1m_2`.

    How many events of a user's history it is of, what the items near it have in common, and which
    they are. Most models have one interest a user; `model.interests` makes them several.
    """
    from rich.console import Console

    chosen = list(dict.fromkeys([*(users or []), *(more_users or [])]))
    if not chosen:
        raise typer.BadParameter("name users: --users u1 u2")
    result = _opened(run, prepared, events, None).interests(chosen)
    if out is not None:
        result.save(out)
        say(f"{len(result):,} interests in {out}")
    else:
        Console(width=160).print(result.rich(len(result)))


def _check_who(chosen: list[str], all_users: bool, out: Path | None) -> None:
    from mtrec_jax import processes

    if bool(chosen) == all_users:
        raise typer.BadParameter("name --users, or ask for --all-users (with --out FILE)")
    if processes.count() > 1 and not all_users:
        raise typer.BadParameter("several processes share --all-users; name --users to one process")
    if all_users and out is None:
        raise typer.BadParameter("--all-users writes a file: add --out FILE")


def _written(recommender: Any, chosen: list[str], out: Path | None, asked: dict[str, Any]) -> int:
    """Write the answers for users, or for everybody where none is named; the number of rows."""
    from mtrec_jax import processes
    from mtrec_jax.result import print_recommendations, save_tables
    from mtrec_jax.serving.requests import raw_text

    if out is not None and not chosen:
        tables = _progress(recommender.recommend_all(**asked), recommender)
        return processes.total(save_tables(tables, processes.own_file(out)))
    result = recommender.recommend(chosen, **asked)
    known = recommender.prepared.user_ids
    _warn_unknown([u for u in chosen if raw_text(u) not in known])
    if out is not None:
        result.save(out)
    else:
        print_recommendations(result)
    return len(result)


def _filters(
    recommender: Any,
    allowed: list[str] | None,
    allowed_file: Path | None,
    blocked: list[str] | None,
    blocked_file: Path | None,
    unknown_items: str,
) -> dict[str, Any]:
    """Ids of options and files together, and a line about those that no item has."""
    from mtrec_jax.serving.filters import named, read_filters, read_ids

    known = recommender.prepared
    more = [read_ids(known, file) if file else [] for file in (allowed_file, blocked_file)]
    found: dict[str, Any] = {
        "allowed": [*(allowed or ()), *more[0]] if allowed or allowed_file else None,
        "blocked": [*(blocked or ()), *more[1]],
        "unknown_items": unknown_items,
    }
    for name, unknown in read_filters(known, **found).ignored.items():
        say(f"mtrec: {name}: not in the catalogue, and ignored: {named(unknown)}")
    return found


def _by_user(recommender: Any, file: Path | None, filters: dict[str, Any]) -> dict[str, Any]:
    """The lists of users, in the place of one list for all."""
    from mtrec_jax.serving.filters import read_lists

    if file is None:
        return {}
    if filters["allowed"] is not None:
        raise typer.BadParameter("--allowed-by-user stands in the place of the other --allowed")
    return {"allowed": read_lists(recommender.prepared, file)}


def _quotas(at_most: list[str] | None) -> dict[str, int]:
    """{column: number}."""
    found = {}
    for text in at_most or ():
        name, _, number = (part.strip() for part in text.partition("="))
        if not name or not number.isdecimal():
            raise typer.BadParameter(f"--at-most {text}: write COLUMN=NUMBER, as in author=2")
        found[name] = int(number)
    return found


def predict(
    run: RunFolder,
    rows: Annotated[
        Path,
        typer.Option(
            help="Raw rows like the training ones, or user, item pairs: .csv, .tsv, .jsonl (also "
            ".gz, .zst) or .parquet; otherwise in the training files' format."
        ),
    ],
    out: Annotated[Path, typer.Option(help="A .csv, .jsonl or .parquet file.")],
    on_unknown: Annotated[
        Literal["null", "model"],
        typer.Option(help="Where user or item is not in the data: nothing, or the model's guess."),
    ] = "null",
    looks: Annotated[
        bool,
        typer.Option("--looks", help="Also gates, attention and the fusion's weights, as columns."),
    ] = False,
    prepared: MovedFolder = None,
    events: NewEvents = None,
    profiles: NewUsers = None,
) -> None:
    """Write every task's prediction for given rows or (user, item) pairs."""
    from mtrec_jax.serving.recommender import predict_file

    result = predict_file(_opened(run, prepared, events, profiles), rows, on_unknown, looks)
    if "known" in result.columns:
        unknown = result["known"].count(False)
        if unknown:
            told = ", and nothing is predicted: --on-unknown model" if on_unknown == "null" else ""
            say(
                f"mtrec: {unknown} pairs have a user or an item that is not in the prepared data; "
                f"their column 'known' is false{told}"
            )
    result.save(out)
    say(f"{len(result):,} predictions in {out}")


def _opened(run: Path, prepared: Path | None, events: Path | None, profiles: Path | None) -> Any:
    """The recommender of a run, with the events and users that have come since."""
    from mtrec_jax.compilation import use_compilation_cache
    from mtrec_jax.serving.recommender import Recommender
    from mtrec_jax.train.run import open_run

    use_compilation_cache()
    recommender = Recommender(open_run(run, prepared))
    recommender = recommender.with_events(events) if events else recommender
    return recommender.with_users(profiles) if profiles else recommender


def _progress(tables: Any, recommender: Any) -> Any:
    from rich.console import Console
    from rich.progress import track

    from mtrec_jax import processes
    from mtrec_jax.serving.requests import BATCH

    total = -(-recommender.prepared.manifest.users // (BATCH * processes.count()))
    return track(tables, "recommending", total=total, console=Console(stderr=True))


def _say_fewer(k: int, exclude_seen: bool) -> None:
    hint = ", and items they have seen are left out: --include-seen keeps them"
    say(
        f"mtrec: some users get fewer than {k} items: the catalogue and the filters leave no "
        f"more{hint if exclude_seen else ''}"
    )


def _warn_unknown(users: list[str]) -> None:
    if users:
        shown = ", ".join(repr(user) for user in users[:5]) + (" …" if len(users) > 5 else "")
        say(
            f"mtrec: {len(users)} unknown user{'s' if len(users) > 1 else ''} ({shown}): not in "
            "the prepared data; the most popular items stand in, and 'known' is false"
        )
