"""efftrain: language models that do more with less, from raw text to a model that is cheap to run.

Importing the package imports neither JAX nor TFDS; its subpackages (``efftrain.data``, ``efftrain.models``, ...) import
what they need.
"""

import efftrain.moved  # noqa: F401  makes the old names of modules importable

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str):
    if name == "load":
        from efftrain.train.run.directory import load

        return load
    raise AttributeError(f"module 'efftrain' has no attribute {name!r}")
