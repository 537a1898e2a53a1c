"""Checkpoints of state, data position and configuration together, and the checks when they are read.

It may import ``models``, ``ops`` and ``sharding``, and must not depend on the loop.
"""

from efftrain.moved import old_names

__getattr__ = old_names(__name__)
