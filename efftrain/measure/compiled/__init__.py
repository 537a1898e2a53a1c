"""Analysis of programs that are compiled for chips of another machine: memory, collectives and FLOPs.

It may import ``measure.cost``.
"""
