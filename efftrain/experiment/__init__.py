"""One run on a corpus from its batches to its scorecard, and variants of it side by side.

Recipes and recovery training call it. It may import ``measure``, ``train`` and what these import.
"""
