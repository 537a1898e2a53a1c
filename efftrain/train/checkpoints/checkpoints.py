"""Checkpoints of state, data iterator and configuration together, written in the background by Orbax."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax import Array

from efftrain.config import digest
from efftrain.errors import RunError
from efftrain.progress import console
from efftrain.sharding import hosts
from efftrain.train.checkpoints.checkpoint_errors import (
    all_or_none,
    first_line,
    ignore_late_callbacks,
    reading_errors,
    writing_errors,
)
from efftrain.train.checkpoints.checkpoint_folder import check_writable, lock_folder, open_manager, vanished
from efftrain.train.checkpoints.fingerprints import fingerprints
from efftrain.train.checkpoints.finite import check_finite
from efftrain.train.checkpoints.flat_state import check_same, check_unaltered, flatten, unflatten
from efftrain.train.checkpoints.sparse_storage import BITS, expand, squeeze, stored_names
from efftrain.train.checkpoints.streamed_arrays import Index, StreamedArray, read_blocks

# Orbax logs each save in ten lines, and each failure once per thread before it raises.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class Checkpoints:
    """The checkpoints of one run.

    The state is stored as a flat dict from path (``params/embedding/table``) to array, so that a checkpoint can be read
    without the classes that made it, and onto any mesh. It is stored with a fingerprint of each array and of the data
    iterator's state, because Orbax does not notice when the bytes of an array change on disk.

    With several processes, each writes and reads the shards of its own devices, in one folder that all of them see.
    If the folder is moved or deleted during the run, a warning says so, and the next checkpoint creates it again.

    Args:
      directory: folder of the checkpoints: a path, or a URL that etils knows (gs://bucket/folder).
      keep: number of newest checkpoints that are kept. None: all.
      keep_every: checkpoints whose step is a multiple of this are kept too. None: only the newest.
      read_only: create, tidy and delete nothing, because another process may be writing to the folder.
      streamed: the states that are saved consist of ``StreamedArray``s.

    Raises:
      InUseError: another command writes to the folder.
      RunError: a process cannot write to the folder, or the processes see different folders.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        keep: int | None = None,
        keep_every: int | None = None,
        read_only: bool = False,
        streamed: bool = False,
    ):
        place = epath.Path(directory)
        self.directory: Path | epath.Path = place if "://" in str(directory) else Path(directory).absolute()
        self._lock = None
        if not read_only:
            check_writable(epath.Path(self.directory))
            self._lock = lock_folder(self.directory)
        self._shapes: dict[int, dict[str, Any]] = {}
        self._manager = open_manager(
            self.directory, keep=keep, keep_every=keep_every, read_only=read_only, streamed=streamed
        )

    def save(self, step: int, state: Any, data_state: Any, config: Any, *, squeezed: bool = False) -> None:
        """Starts a save and returns once the arrays are copied; a step that is already saved is left unchanged.

        Args:
          step: number of the step.
          state: pytree of arrays.
          data_state: state of the data iterator, JSON.
          config: configuration of the run, JSON.
          squeezed: store arrays with many zeros without the zeros (``sparse_storage``); for finished models, not for
            runs that will continue.

        Raises:
          RunError: the checkpoint, or the one before it, could not be written.
        """
        if step in self._manager.all_steps():
            return
        flat = squeeze(flatten(state)) if squeezed else flatten(state)
        streams = {name: array for name, array in flat.items() if isinstance(array, StreamedArray)}
        found = {name: array.fingerprint for name, array in streams.items()}
        found |= fingerprints({name: array for name, array in flat.items() if name not in streams})
        data = {"iterator": data_state, "iterator_digest": digest(data_state), "fingerprints": found}
        with writing_errors(self.directory):
            self._manager.wait_until_finished()  # the save would wait too
            if vanished(self.directory, self.steps()):
                self._manager.reload()
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(flat),
                    data=ocp.args.JsonSave(data),
                    config=ocp.args.JsonSave(config),
                ),
                force=True,
            )

    def wait(self) -> None:
        """Waits until every save that was started is on disk.

        Raises:
          RunError: a checkpoint could not be written, or was moved or deleted immediately.
        """
        with writing_errors(self.directory):
            self._manager.wait_until_finished()
        newest = self.directory / str(max(self.steps(), default=""))
        if not hosts.from_first(newest.exists):
            raise RunError(
                f"checkpoint {newest} was moved or deleted as soon as it was written; put it back, then the same "
                "command continues from it"
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        """Waits for the saves that were started, and closes the folder."""
        try:
            with writing_errors(self.directory):
                self._manager.close()
        finally:
            if self._lock is not None:
                self._lock.release()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def restore(self, abstract_state: Any) -> tuple[int, Any, Any] | None:
        """Restores the newest complete checkpoint.

        Newer ones that are damaged are named and moved to ``damaged/`` beside the directory; the run writes them again.

        Args:
          abstract_state: the state as ShapeDtypeStructs; if they carry shardings, the arrays get these shardings.

        Returns:
          (step, state, data iterator's state), or None if there is no checkpoint.

        Raises:
          RunError: the newest complete checkpoint belongs to another model, or there are checkpoints and none is
            complete.
        """
        wanted = flatten(abstract_state)
        found = self._newest_complete(lambda step: self._read(step, wanted))
        if found is None:
            return None
        step, (flat, data_state) = found
        for newer in [s for s in self.steps() if s > step]:
            self._set_aside(newer)
        return step, unflatten(flat, abstract_state), data_state

    def restore_model(self, abstract_variables: Any, *, finite: bool = True) -> Any:
        """Restores only the model's variables from the newest complete checkpoint, averaged ones if the run keeps them.

        Args:
          abstract_variables: the variables as ShapeDtypeStructs.
          finite: raise an error if the model has numbers that are not finite.

        Raises:
          RunError: as for ``restore``; also if there is no checkpoint, or if numbers are not finite.
        """
        variables = flatten(abstract_variables)
        step, arrays = self._newest_model(lambda step: self._read_model(step, variables))
        for name, array in arrays.items() if finite else ():
            check_finite(array, name, variables, self.directory / str(step))
        return unflatten(arrays, abstract_variables)

    def model_arrays(self, abstract_variables: Any) -> Iterator[tuple[str, Array]]:
        """Yields (name, array) of what ``restore_model`` reads, large arrays first; only one is held here at a time.

        Args:
          abstract_variables: the variables as ShapeDtypeStructs.

        Raises:
          RunError: as for ``restore_model``; also if an array after the first is damaged.
        """
        variables = flatten(abstract_variables)
        first, *rest = sorted(variables, key=lambda name: (-variables[name].size, name))
        step, array = self._newest_model(lambda step: self._read_model(step, {first: variables[first]}))
        for name in (first, *rest):
            if name not in array:
                with reading_errors(self.directory / str(step)):
                    array = self._read_model(step, {name: variables[name]})
            check_finite(array[name], name, variables, self.directory / str(step))
            yield name, array.pop(name)

    def model_blocks(self, abstract_variables: Any) -> dict[str, Iterator[tuple[Index, np.ndarray]]]:
        """Returns for each variable an iterator over (index, block) of what ``restore_model`` reads.

        The blocks of a variable come in the order of the array, and are as small as its chunks on disk allow; arrays
        that are stored sparsely come whole. What is read is checked, the fingerprint after the last block.

        Args:
          abstract_variables: the variables as ShapeDtypeStructs.

        Raises:
          RunError: as for ``restore_model``; iterators raise it too, if an array is damaged.
        """
        variables = flatten(abstract_variables)
        first = min(variables, key=lambda name: (variables[name].size, name))
        step, _ = self._newest_model(lambda step: self._read_model(step, {first: variables[first]}))
        folder, saved, places = self.directory / str(step), self._saved_shapes(step), self._places(step, variables)
        whole = {name for name, place in places.items() if place + BITS in saved}
        stored = {name: place for name, place in places.items() if name not in whole}
        wanted = {place: variables[name] for name, place in stored.items()}
        check_same(folder, {place: saved[place] for place in wanted if place in saved}, wanted)
        data = self._manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]

        def read(name: str) -> Iterator[tuple[Index, np.ndarray]]:
            with reading_errors(folder):
                if name in whole:
                    array = np.asarray(self._read_model(step, {name: variables[name]})[name])
                    found: Any = [(tuple(slice(0, n) for n in array.shape), array)]
                else:
                    place = stored[name]
                    found = read_blocks(str(folder / "state"), place, data["fingerprints"][place])
                for index, block in found:
                    check_finite(block, name, variables, folder, first=index[0].start if index else 0)
                    yield index, block.astype(variables[name].dtype, copy=False)

        return {name: read(name) for name in variables}

    def _places(self, step: int, variables: dict[str, Any]) -> dict[str, str]:
        """Where a checkpoint holds the variables of the model."""
        saved = self._saved_shapes(step)
        trained = "ema" if any(name.startswith("ema/") for name in saved) else "params"
        untrained = {name.removesuffix(BITS) for name in saved if name.startswith("model_state/")}
        places = {name: f"model_state/{name}" for name in variables}
        return {name: place if place in untrained else f"{trained}/{name}" for name, place in places.items()}

    def _read_model(self, step: int, variables: dict[str, Any]) -> dict[str, Any]:
        saved, places = self._saved_shapes(step), self._places(step, variables)
        wanted = {place: variables[name] for name, place in places.items()}
        stored, _ = self._read(step, stored_names(wanted, saved), partial=True)
        flat = expand(stored, wanted)
        return {name: flat[place] for name, place in places.items()}

    def restore_step(
        self, step: int, abstract_state: Any, *, new: tuple[str, ...], instead: tuple[str, str]
    ) -> tuple[dict[str, Array], Any]:
        """Restores one checkpoint, from which another run continues.

        Args:
          step: step of an existing checkpoint.
          abstract_state: state of the other run as ShapeDtypeStructs with shardings.
          new: arrays with one of these words in their names may be missing in the checkpoint.
          instead: two prefixes of names. If no name in the checkpoint begins with the first, arrays whose names begin
            with it are read from the names that begin with the second instead.

        Returns:
          (arrays by name, data iterator's state).

        Raises:
          RunError: the checkpoint is damaged, holds only a model, or belongs to another model or optimizer.
        """
        saved, (ours, theirs) = self._saved_shapes(step), instead
        if not any(name.startswith(theirs) for name in saved):
            raise RunError(
                f"{self.directory / str(step)} holds a model without the state of an optimizer and a position in the "
                "data, as efftrain compress and efftrain import leave it; start from this model with "
                "training.finetune RUN, or resume from the run that it was made from"
            )
        same = any(name.startswith(ours) for name in saved)
        abstract = flatten(abstract_state)
        place = {n: n if same or not n.startswith(ours) else theirs + n.removeprefix(ours) for n in abstract}
        place = {n: p for n, p in place.items() if p in saved or not any(word in n for word in new)}
        with reading_errors(self.directory / str(step)):
            arrays, data_state = self._read(step, {p: abstract[n] for n, p in place.items()})
        return {n: arrays[p] for n, p in place.items()}, data_state

    def _newest_model(self, read: Callable[[int], Any]) -> tuple[int, Any]:
        found = self._newest_complete(read)
        if found is None:
            raise RunError(f"{self.directory} holds no checkpoint; train the run first")
        return found

    def _newest_complete(self, read: Callable[[int], Any]) -> tuple[int, Any] | None:
        damaged = []
        for step in reversed(self.steps()):
            try:
                return step, read(step)
            except RunError:
                raise
            except Exception as error:  # Orbax has no single class for a file that is missing, short or altered
                damaged.append(str(step))
                ignore_late_callbacks()
                console.print(
                    f"warning: checkpoint {self.directory / str(step)} is damaged ({first_line(error)}); trying the "
                    "one before",
                    style="yellow",
                    markup=False,
                )
        if damaged:
            raise RunError(
                f"no checkpoint in {self.directory} can be read (damaged: {', '.join(damaged)}); restore a copy, or "
                "start again with another --out"
            )
        return None

    def _saved_shapes(self, step: int) -> dict[str, Any]:
        """Read once: ``model_arrays`` asks for every array, and a complete checkpoint does not change."""
        if step not in self._shapes:
            self._shapes[step] = dict(self._manager.item_metadata(step)["state"].tree)
        return self._shapes[step]

    def _read(self, step: int, wanted: dict[str, Any], *, partial: bool = False) -> tuple[dict[str, Any], Any]:
        with all_or_none():
            restored = self._restore(step, wanted, partial=partial)
        data = restored["data"]
        check_unaltered(restored["state"], data["fingerprints"], data["iterator"], data["iterator_digest"])
        return restored["state"], data["iterator"]

    def _restore(self, step: int, wanted: dict[str, Any], *, partial: bool) -> Any:
        saved = self._saved_shapes(step)
        if partial:
            saved = {name: saved[name] for name in wanted if name in saved}
        check_same(self.directory / str(step), saved, wanted)
        return self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    item=wanted,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                    partial_restore=partial,
                ),
                data=ocp.args.JsonRestore(),
            ),
        )

    def _set_aside(self, step: int) -> None:
        target = epath.Path(self.directory).parent / "damaged" / str(step)
        with hosts.together():
            if hosts.process_index() == 0:
                if target.exists():
                    target.rmtree()
                target.parent.mkdir(parents=True, exist_ok=True)
                (epath.Path(self.directory) / str(step)).rename(target)
        self._shapes.pop(step, None)
        self._manager.reload()
