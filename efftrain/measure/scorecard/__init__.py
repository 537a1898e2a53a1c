"""The scorecard: all figures of a model, each with its unit and the method by which it was obtained.

It may import ``measure.cost``; ``measure.quality`` gives it figures and is not imported.
"""

from efftrain.moved import old_names

__getattr__ = old_names(__name__)
