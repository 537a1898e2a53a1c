"""efftrain: language models that do more with less, from raw text to a model that is cheap to run.

Importing the package imports neither JAX nor TFDS; the rooms (``efftrain.data``, ``efftrain.models``, ...) bring what
they need.
"""

import efftrain.moved  # noqa: F401  old names of modules are found

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str):
    if name == "load":
        from efftrain.train.run.directory import load

        return load
    raise AttributeError(f"module 'efftrain' has no attribute {name!r}")
