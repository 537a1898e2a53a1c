"""The quality of a model: bits per byte, tasks, probes, and the held-out rows on which they are measured.

It may import ``data``, ``models`` and ``train``.
"""
