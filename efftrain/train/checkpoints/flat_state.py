"""States as flat dictionaries from path to array, as checkpoints hold them, and the comparison of two of them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from efftrain.config import difference, digest
from efftrain.errors import RunError
from efftrain.train.checkpoints.fingerprints import fingerprints

if TYPE_CHECKING:
    from etils import epath


def flatten(state: Any) -> dict[str, Any]:
    """Flattens a pytree to {path: leaf}, with paths such as ``params/blocks/0/mlp/up/kernel``."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def unflatten(flat: dict[str, Any], like: Any) -> Any:
    """Inverse of ``flatten``, in the structure of ``like``."""
    paths, tree = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree.unflatten(tree, [flat[_name(path)] for path, _ in paths])


def check_unaltered(flat: dict[str, Any], saved: dict[str, int], data_state: Any, data_digest: str) -> None:
    for name, found in fingerprints(flat).items():
        if found != saved[name]:
            raise ValueError(f"{name} differs from what was saved")
    if digest(data_state) != data_digest:
        raise ValueError("the data iterator's state is not the one that was saved")


def _name(path: tuple) -> str:
    in_variable = jax.tree_util.GetAttrKey("value")  # a module called ``value`` is a DictKey
    return jax.tree_util.keystr(tuple(key for key in path if key != in_variable), simple=True, separator="/")


def check_same(where: "Path | epath.Path", saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    lines = difference(
        {k: str(tuple(v.shape)) for k, v in saved.items()},
        {k: str(tuple(v.shape)) for k, v in wanted.items()},
    )
    lines.sort(key=lambda line: not line.startswith("params/"))  # the optimizer state only follows the parameters
    if lines:
        raise RunError(
            f"{where} is a checkpoint of another model or optimizer: {lines[0]}"
            f"{f' and {len(lines) - 1} more' if len(lines) > 1 else ''}; use the configuration and the code "
            "that wrote it, or start another run"
        )
