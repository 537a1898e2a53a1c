"""The scorecard: a row per model, a column per figure, each with unit and method.

It may import ``measure.cost``; ``measure.quality`` gives it figures and is not imported.
"""

from efftrain.moved import old_names

__getattr__ = old_names(__name__)
