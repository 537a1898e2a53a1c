"""The run directory: configuration, identity, tokenizer, environment.

It may import ``models`` and ``train.checkpoints``; every other module of ``train`` may import it.
"""
