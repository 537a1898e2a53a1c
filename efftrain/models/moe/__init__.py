"""Mixture of experts: the layer, its experts on a mesh, and dense models turned into one.

It may import ``models.components``, ``models.linear`` and ``models.mlp``.
"""

from efftrain.models.moe.layer import DISPATCH as DISPATCH
from efftrain.models.moe.layer import MoE as MoE
from efftrain.moved import old_names

__getattr__ = old_names(__name__)
