"""Compiled programs without the chips that they are for: memory, collectives, products.

It may import ``measure.cost``.
"""
