"""Experiments: one training run on a corpus with its scorecard, comparisons over seeds, baselines, and presets.

Recipes and the training after pruning call it. It may import ``interop``, ``measure``, ``train`` and what these
import.
"""
