"""Mixture of experts: the layer, its experts on a mesh, and upcycling of dense models.

It may import ``models.components``, ``models.quantization`` and ``models.mlp``; only ``upcycle`` imports the decoder.
"""

from efftrain.models.moe.layer import DISPATCH as DISPATCH
from efftrain.models.moe.layer import MoE as MoE
from efftrain.moved import old_names

__getattr__ = old_names(__name__)
