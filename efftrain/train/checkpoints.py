"""Checkpoints of state, data iterator and configuration together, written in the background by Orbax."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from efftrain.config import difference
from efftrain.errors import RunError
from efftrain.progress import console

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports each save in ten lines


class Checkpoints:
    """The checkpoints of one run.

    The state is kept as a flat dict from path (``params/embedding/table``) to array, so that a checkpoint can be read
    without the classes that made it, and onto any mesh.
    """

    def __init__(self, directory: Path, *, keep: int | None = None):
        self.directory = Path(directory).absolute()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True),
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
                "config": ocp.JsonCheckpointHandler(),
            },
        )

    def save(self, step: int, state: Any, data_state: Any, config: Any) -> None:
        """Starts a save and returns once the arrays are copied; a step that is there already is left as it is."""
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(flatten(state)),
                data=ocp.args.JsonSave({"iterator": data_state}),
                config=ocp.args.JsonSave(config),
            ),
            force=True,
        )

    def wait(self) -> None:
        """Returns when everything started is on disk."""
        self._manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        """Waits for what was started, and closes."""
        self._manager.close()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def restore(self, abstract_state: Any) -> tuple[int, Any, Any] | None:
        """The newest complete checkpoint. Newer ones that are damaged are named and deleted: the run writes them again.

        Args:
          abstract_state: the state as ShapeDtypeStructs; where they carry shardings, the arrays come sharded so.

        Returns:
          (step, state, data iterator's state), or None where there is no checkpoint.

        Raises:
          RunError: the newest complete checkpoint is of another model, or checkpoints exist and none is complete.
        """
        wanted = flatten(abstract_state)
        found = self._newest_complete(lambda step: self._read(step, wanted))
        if found is None:
            return None
        step, (flat, data_state) = found
        for newer in [s for s in self.steps() if s > step]:
            self._manager.delete(newer)
        return step, unflatten(flat, abstract_state), data_state

    def restore_model(self, abstract_variables: Any) -> Any:
        """Only the model's variables, of the newest complete checkpoint: averaged ones where the run keeps them.

        Raises:
          RunError: as for ``restore``, and where there is no checkpoint.
        """
        variables = flatten(abstract_variables)

        def read(step: int) -> dict[str, Any]:
            saved = self._saved_shapes(step)
            trained = "ema" if any(name.startswith("ema/") for name in saved) else "params"
            places = {
                name: next(p for p in (f"{trained}/{name}", f"model_state/{name}") if p in saved) for name in variables
            }
            flat, _ = self._read(step, {place: variables[name] for name, place in places.items()}, partial=True)
            return {name: flat[place] for name, place in places.items()}

        found = self._newest_complete(read)
        if found is None:
            raise RunError(f"{self.directory} holds no checkpoint; train the run first")
        return unflatten(found[1], abstract_variables)

    def _newest_complete(self, read: Callable[[int], Any]) -> tuple[int, Any] | None:
        damaged = []
        for step in reversed(self.steps()):
            try:
                return step, read(step)
            except RunError:
                raise
            except Exception as error:  # Orbax has no one class for a file that is missing, short or altered
                damaged.append(str(step))
                console.print(
                    f"warning: checkpoint {self.directory / str(step)} is damaged ({_first_line(error)}); trying the "
                    "one before",
                    style="yellow",
                    markup=False,
                )
        if damaged:
            raise RunError(
                f"no checkpoint in {self.directory} can be read (damaged: {', '.join(damaged)}); restore a copy, or start "
                "again with another --out"
            )
        return None

    def _saved_shapes(self, step: int) -> dict[str, Any]:
        return dict(self._manager.item_metadata(step)["state"].tree)

    def _read(self, step: int, wanted: dict[str, Any], *, partial: bool = False) -> tuple[dict[str, Any], Any]:
        saved = self._saved_shapes(step)
        if partial:
            saved = {name: saved[name] for name in wanted}
        _check_same(self.directory / str(step), saved, wanted)
        restored = self._manager.restore(
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
        return restored["state"], restored["data"]["iterator"]


def flatten(state: Any) -> dict[str, Any]:
    """A pytree as {path: leaf}, with paths such as ``params/blocks/0/mlp/up/kernel``."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def unflatten(flat: dict[str, Any], like: Any) -> Any:
    """The inverse of ``flatten``, in the structure of ``like``."""
    paths, tree = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree.unflatten(tree, [flat[_name(path)] for path, _ in paths])


def _name(path: tuple) -> str:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return name.removesuffix("/value").replace("/value/", "/")


def _check_same(where: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    lines = difference(
        {k: str(tuple(v.shape)) for k, v in saved.items()},
        {k: str(tuple(v.shape)) for k, v in wanted.items()},
    )
    if lines:
        raise RunError(
            f"{where} is a checkpoint of another model or optimizer: {lines[0]}"
            f"{f' and {len(lines) - 1} more' if len(lines) > 1 else ''}; use the run's own configuration or another --out"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
