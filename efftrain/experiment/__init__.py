"""Experiments: one training run on a corpus with its scorecard, and the comparison of several variants over seeds.

Recipes and the training after pruning call it. It may import ``measure``, ``train`` and what these import.
"""
