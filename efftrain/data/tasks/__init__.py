"""Examples of a task: read from files or synthesised, and packed into rows.

It may import ``data.storage`` and ``data.sources``.
"""
