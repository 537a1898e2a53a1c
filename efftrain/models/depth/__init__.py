"""Depth policies: layers that only some tokens pass, their routers, and early exits.

It may import the decoder and its blocks; decoding imports it.
"""

from efftrain.moved import old_names

__getattr__ = old_names(__name__)
