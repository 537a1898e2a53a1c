"""The union of the commands.

Each of them has ``apply(run, text, kept) -> (model, report)``, ``name``, the suffix of the new run's default name, and
``chosen_on``, the number of validation rows on which it chooses shapes or formats.
"""

from efftrain.compress.commands.prune import Prune
from efftrain.compress.commands.quantize import Quantize
from efftrain.compress.commands.structured_prune import StructuredPrune

AnyPrune = Prune | StructuredPrune  # what can be followed by recovery training
Compression = Quantize | AnyPrune
