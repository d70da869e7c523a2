#!/usr/bin/env bash
# polars 2.1.0, pyarrow 26.0.1: the same frame has other Arrow types by its two ways out.
# frame.to_arrow() gives large_string, pyarrow.table(frame), by the stream interface, string_view, of
# which PyArrow groups and counts, but neither filters, sorts, compares nor looks up. A Categorical
# becomes a dictionary of views, which neither dictionary_decode nor a cast to text can take apart;
# its dictionary cast first, and then taken by its indices, can be read. Seen: "no kernel matching
# input types (string_view, ...)" for filter, ==, index_in, dictionary_decode and cast.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet polars==2.1.0 pyarrow==26.0.1
"$work/venv/bin/python" - <<'PY'
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

kind = pl.Series(["tea", "ink", "tea"], dtype=pl.Categorical)
frame = pl.DataFrame({"kind": kind, "name": ["x", "y", "x"]})
one, other = frame.to_arrow(), pa.table(frame)
print("to_arrow:", one.schema.types, "table:", other.schema.types)
assert pa.types.is_large_string(one["name"].type) and pa.types.is_string_view(other["name"].type)
assert pa.types.is_string_view(other["kind"].type.value_type)

name, dictionary = other["name"], other["kind"].chunk(0)
assert len(pc.unique(name)) == 2 and other.group_by("name").aggregate([("name", "count")]).num_rows == 2
refused = {
    "filter": lambda: name.filter(pa.array([True, False, True])),
    "==": lambda: pc.equal(name, "x"),
    "index_in": lambda: pc.index_in(name, value_set=pa.array(["x"])),
    "sort_indices": lambda: pc.sort_indices(name),
    "dictionary_decode": lambda: dictionary.dictionary_decode(),
    "cast": lambda: dictionary.cast(pa.string()),
}
for what, run in refused.items():
    try:
        run()
    except (pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        print(f"{what}: {type(error).__name__}: {str(error)[:70]}")
    else:
        raise SystemExit(f"{what} works now")
text = dictionary.dictionary.cast(pa.string()).take(dictionary.indices)
assert text.to_pylist() == ["tea", "ink", "tea"]
PY
