"""The source of an import: a Hugging Face folder or a GGUF file, behind one small interface."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from efftrain.interop.settings import Settings


class ModelSource(Protocol):
    """Files with a model of another project.

    Attributes:
      path: the folder or file.
      settings: fields of the configuration, as in a ``config.json`` of transformers.
      shapes: name -> shape of every tensor, with the names that transformers gives them.
      texts: files that belong to the model and that a run keeps: tokenizer, chat template, generation settings.
      origin: what a run records of where its model came from: format, licence, dtypes.
    """

    path: Path
    settings: Settings
    shapes: Mapping[str, tuple[int, ...]]
    texts: Mapping[str, str]
    origin: Mapping[str, Any]

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor in its dtype (a float type); nothing else of the file is held."""
        ...
