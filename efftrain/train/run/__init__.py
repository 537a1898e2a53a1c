"""The run directory: configuration, identity, tokenizer, environment.

It may import ``models`` and ``train.checkpoints``; every other module of ``train`` may import it.
"""

from efftrain.moved import old_names

__getattr__ = old_names(__name__)
