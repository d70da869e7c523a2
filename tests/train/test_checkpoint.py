"""Checkpoints: which are kept, that nothing is lost in them, and what damage looks like."""

from __future__ import annotations

import errno
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore

from mtrec_jax.balance import BALANCERS
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.data.pipeline import BatchSource, training_batches
from mtrec_jax.errors import CheckpointError, Error
from mtrec_jax.train import checkpoint
from mtrec_jax.types import TrainState


def make_state(step: int = 0) -> TrainState:
    """A state with every part in use, different in each step."""
    params = {"network": {"kernel": jnp.arange(6.0).reshape(2, 3) + step}}
    tables = {"lazy_adam": jnp.full((128, 2), 0.5 + step)}
    return TrainState(
        params=params,
        tables=tables,
        slots={"lazy_adam": (jnp.full((128, 2), 1.5 + step), jnp.full(128, step, jnp.int32))},
        scratch={"lazy_adam": jnp.zeros(128, jnp.int32)},
        optimizer=optax.adam(0.1).init(params),
        balance=jnp.array([0.25, 0.75]) + step,
        drawing={"queue": jnp.arange(4) + step},
        key=jax.random.fold_in(jax.random.key(7, impl="rbg"), step),
        step=jnp.array(step, jnp.int32),
        sums={"click": jnp.array([1.25, 3.0]) + step},
        rounds=jnp.array(1 + step, jnp.int32),
        bad=jnp.array([0, step], jnp.int32),
    )


def batches_of(prepared: Prepared) -> Any:
    return training_batches(BatchSource(prepared, "train", 8, seed=0, epochs=3))


def save_all(folder: Path, prepared: Prepared, best: list[int | None]) -> None:
    """Steps 1, 2, ... with what the loop calls the best step at each of them."""
    batches, notes = batches_of(prepared), dict[str, Any]()
    with checkpoint.open_manager(folder, notes) as manager:
        for step, best_step in enumerate(best, 1):
            notes["best_step"] = best_step
            checkpoint.save(manager, make_state(step), batches, notes)
            manager.wait_until_finished()


@pytest.mark.parametrize(
    ("best", "steps"),
    [
        ([1, 2, 2, 2, 2], [2, 4, 5]),
        pytest.param([1, 2, 3], [2, 3], marks=pytest.mark.slow),
        pytest.param([1, 1, 1, 1], [1, 3, 4], marks=pytest.mark.slow),
        ([None, None, None], [2, 3]),  # stopped before the first evaluation
        ([None, 2, 2, 4, 4, 4], [4, 5, 6]),
    ],
)
def test_the_best_and_the_two_latest_steps_are_kept(
    shop_prepared: Prepared, tmp_path: Path, best: list[int | None], steps: list[int]
) -> None:
    save_all(tmp_path, shop_prepared, best)
    with checkpoint.open_manager(tmp_path) as reopened:
        assert sorted(reopened.all_steps()) == steps
        assert checkpoint.best_or_latest(reopened, tmp_path) == (best[-1] or steps[-1])


def test_a_reopened_folder_still_knows_its_best(shop_prepared: Prepared, tmp_path: Path) -> None:
    """A continued run must not throw away the best step of the run before it."""
    save_all(tmp_path, shop_prepared, [1, 1])
    notes = {"best_step": 1}
    with checkpoint.open_manager(tmp_path, notes) as manager:
        for step in (3, 4):
            checkpoint.save(manager, make_state(step), batches_of(shop_prepared), notes)
        manager.wait_until_finished()
        assert sorted(manager.all_steps(read=True)) == [1, 3, 4]


def test_the_best_step_is_known_while_any_notes_are_whole(
    shop_prepared: Prepared, tmp_path: Path
) -> None:
    save_all(tmp_path, shop_prepared, [None, 2, 2])
    for step in (3, 2):
        assert _best(tmp_path) == 2
        file = next(p for p in (tmp_path / str(step) / "meta").iterdir() if b"best" in _read(p))
        file.write_bytes(_read(file).replace(b'"best_step": 2', b'"best_step": 1'))
    with pytest.raises(CheckpointError, match=r"3 cannot be restored.* notes cannot be read"):
        _best(tmp_path)


def _read(path: Path) -> bytes:
    return path.read_bytes()


def _best(folder: Path) -> int:
    with checkpoint.open_manager(folder) as manager:
        return checkpoint.best_or_latest(manager, folder)


def test_what_methods_of_balancing_keep_comes_back(shop_prepared: Prepared, tmp_path: Path) -> None:
    """Of all methods, at the representation and at the parameters."""
    state = make_state(1)
    methods = [options() for options in BALANCERS.values()]
    methods += [replace(each, at="parameters") for each in methods if hasattr(each, "at")]
    every = [each.make(jnp.array([1.0, 0.5])).init(state.params) for each in methods]
    state = state._replace(balance=jax.tree.map(lambda part: part + 1, every))
    batches, notes = batches_of(shop_prepared), dict[str, Any]()
    with checkpoint.open_manager(tmp_path, notes) as manager:
        checkpoint.save(manager, state, batches, notes)
        manager.wait_until_finished()
        like = state._replace(balance=every)
        found, _ = checkpoint.restore(manager, 1, like, batches_of(shop_prepared))
    jax.tree.map(np.testing.assert_array_equal, found.balance, state.balance)


def test_the_whole_state_and_the_position_in_the_data_come_back(
    shop_prepared: Prepared, tmp_path: Path
) -> None:
    batches = batches_of(shop_prepared)
    meta = {"best": 0.5, "best_step": 3, "stale": 2, "bytes": 77, "done": False}
    drawn = [next(batches) for _ in range(4)]
    state = make_state(4)
    with checkpoint.open_manager(tmp_path, meta) as manager:
        checkpoint.save(manager, state, batches, meta)
        manager.wait_until_finished()
        after = next(batches)
        again = batches_of(shop_prepared)
        like = make_state()._replace(scratch={"lazy_adam": jnp.full(128, 9, jnp.int32)})
        found, notes = checkpoint.restore(manager, 4, like, again)
    assert notes == meta
    assert jax.random.key_impl(found.key) == jax.random.key_impl(state.key)
    found, state = (s._replace(key=jax.random.key_data(s.key)) for s in (found, state))
    jax.tree.map(np.testing.assert_array_equal, found, state)  # raises where structures differ
    following = next(again)
    np.testing.assert_array_equal(following.row, after.row)
    assert not np.array_equal(following.row, drawn[0].row)


def test_the_model_alone_is_restored_without_the_trainer(
    shop_prepared: Prepared, tmp_path: Path
) -> None:
    state = make_state(1)
    save_all(tmp_path, shop_prepared, [None])
    with checkpoint.open_manager(tmp_path) as manager:
        like = jax.eval_shape(lambda: (state.params, state.tables))
        params, tables = checkpoint.restore_model(manager, 1, like)
    jax.tree.map(np.testing.assert_array_equal, (params, tables), (state.params, state.tables))


SPLITS = ((), ("table",), (("table", "data"),), (None, "table"), ("data", "table"))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_digests_do_not_depend_on_how_an_array_is_split(split: Any, dtype: str) -> None:
    rng = np.random.default_rng(0)
    array = jnp.asarray(rng.normal(size=(16, 8, 3)) * 9).astype(dtype)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "table"))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*split))
    one, several = ({"table": a} for a in (array, jax.device_put(array, where)))
    assert checkpoint.digests(one) == checkpoint.digests(several)


def test_digests_are_the_sum_that_they_say() -> None:
    """Words times 1 + K x place, modulo 2**32, past the first piece of 2**16 as well."""
    words = np.random.default_rng(1).integers(0, 2**32, 2**16 + 5, np.uint32)
    weights = (1 + 2654435762 * np.arange(len(words), dtype=np.uint64)) % 2**32
    expected = int((words.astype(np.uint64) * weights % 2**32).sum() % 2**32)
    assert checkpoint.digests({"a": jnp.asarray(words)}) == {"['a']": expected}
    floats = jnp.asarray(words.view(np.float32).reshape(-1, 3))
    assert checkpoint.digests([floats]) == {"[0]": expected}
    assert checkpoint.digests({"step": jnp.array(7, jnp.int32)}) == {"['step']": 7}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_any_wrong_bit_and_any_exchange_shows(dtype: str) -> None:
    array = np.asarray(jnp.arange(1, 13).astype(dtype).reshape(4, 3))
    right = checkpoint.digests([jnp.asarray(array)])
    raw = np.frombuffer(array.tobytes(), np.uint8)
    for bit in range(8 * len(raw)):
        wrong = raw.copy()
        wrong[bit // 8] ^= 1 << bit % 8
        changed = wrong.view(array.dtype).reshape(array.shape)
        assert checkpoint.digests([jnp.asarray(changed)]) != right, bit
    assert checkpoint.digests([jnp.asarray(array[[1, 0, 2, 3]])]) != right


RESTORE = """
import sys
from dataclasses import replace
from pathlib import Path
import jax.numpy as jnp
from mtrec_jax.errors import CheckpointError
from mtrec_jax.train import checkpoint

for folder, width in (("damaged", 3), ("whole", 4)):
    like = {"network": {"kernel": jnp.zeros((2, width))}}, {"lazy_adam": jnp.zeros((128, 2))}
    with checkpoint.open_manager(Path(folder)) as manager:
        try:
            checkpoint.restore_model(manager, 1, like)
        except CheckpointError as error:
            print(error)
"""


@pytest.mark.slow
def test_a_truncated_file_and_another_model_are_found_out(
    shop_prepared: Prepared, tmp_path: Path
) -> None:
    """In a process of its own: when one array fails, Orbax leaves the reading of others behind."""
    for folder in ("whole", "damaged"):
        save_all(tmp_path / folder, shop_prepared, [None])
    data = [p for p in (tmp_path / "damaged" / "1" / "model").rglob("d/*") if p.is_file()]
    assert data
    for path in data:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    command = [sys.executable, "-c", RESTORE]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    damaged, other = ran.stdout.splitlines()
    for folder, message in (("damaged", damaged), ("whole", other)):
        assert message.startswith(f"checkpoint {tmp_path / folder / '1'} cannot be restored")
        assert "It is damaged" in message
        assert "to continue from the step before it" in message


OF_TENSORSTORE = "Error reading: {}: Failed to open: \"d/6f30\": {} [os_error_code='{}']"


@pytest.mark.parametrize(
    ("error", "is_damage"),
    [
        (OSError(errno.EIO, "Input/output error"), False),
        (OSError(errno.ESTALE, "Stale file handle"), False),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (ValueError(OF_TENSORSTORE.format("ABORTED", "Stale file handle", 116)), False),
        ("looped", False),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), True),
        (ValueError(OF_TENSORSTORE.format("NOT_FOUND", "No such file or directory", 2)), True),
        (ValueError("DATA_LOSS: checksum does not match"), True),
        ("short", True),
    ],
)
def test_storage_that_fails_is_no_damage(
    shop_prepared: Prepared, tmp_path: Path, error: Exception | str, is_damage: bool
) -> None:
    """A passing error of reading moves no step aside, and no other step stands in for it."""
    folder, notes = tmp_path / "checkpoints", list[str]()
    if isinstance(error, str):
        error = _error_of_tensorstore(tmp_path / "array", error)
    save_all(folder, shop_prepared, [1, 1])
    with checkpoint.open_manager(folder) as manager:
        restore = manager.restore

        def fail(step: int, **rest: Any) -> Any:
            if step == 2:
                raise error
            return restore(step, **rest)

        manager.restore = fail
        given = manager, make_state(), batches_of(shop_prepared), notes.append
        if is_damage:
            found = checkpoint.restore_latest(*given)
            assert found is not None
            assert int(found[0].step) == 1
            assert (tmp_path / "damaged" / "2").is_dir()
            return
        for read in (
            lambda: checkpoint.restore_latest(*given),
            lambda: checkpoint.best_or_latest(manager, folder),
        ):
            with pytest.raises(Error, match=r"2 could not be read: .*nothing was moved") as raised:
                read()
            assert not isinstance(raised.value, CheckpointError)
    assert (folder / "2").is_dir()
    assert not (tmp_path / "damaged").exists()
    assert notes == []


def _error_of_tensorstore(folder: Path, what: str) -> Exception:
    """As it says it today: of a file that the system does not open, or of one that was cut."""
    store = {"driver": "ocdbt", "base": folder.as_uri()}
    new = {"driver": "zarr", "kvstore": store, "metadata": {"shape": [999], "dtype": "<i4"}}
    tensorstore.open(new, create=True).result().write(np.arange(999, dtype=np.int32)).result()
    for file in (folder / "d").iterdir():
        content = file.read_bytes()
        file.unlink()
        if what == "looped":
            file.symlink_to(file)
        else:
            file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"Error") as raised:
        tensorstore.open({"driver": "zarr", "kvstore": store}).result().read().result()
    return raised.value


def test_an_unfinished_step_is_no_step(shop_prepared: Prepared, tmp_path: Path) -> None:
    """What a killed process leaves behind is cleared away, but only by the process that writes."""
    left = tmp_path / "2.orbax-checkpoint-tmp"
    (left / "model").mkdir(parents=True)
    with checkpoint.open_manager(tmp_path) as manager:
        assert manager.latest_step() is None
    assert left.exists()
    save_all(tmp_path, shop_prepared, [1])
    with checkpoint.open_manager(tmp_path) as manager:
        assert manager.all_steps() == [1]
    assert not left.exists()


def test_a_folder_without_a_checkpoint_says_what_to_do_and_reading_creates_nothing(
    tmp_path: Path,
) -> None:
    with (
        checkpoint.open_manager(tmp_path / "checkpoints") as manager,
        pytest.raises(CheckpointError, match=r"has no checkpoint yet\. Run: mtrec train CONFIG"),
    ):
        checkpoint.best_or_latest(manager, tmp_path / "checkpoints")
    assert not list(tmp_path.iterdir())
