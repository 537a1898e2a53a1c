"""Provides the examples of a task: reads them from files or synthesises them, and packs them into rows.

This package may import ``data.storage`` and ``data.sources``.
"""
