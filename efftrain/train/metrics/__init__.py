"""Metrics of a run and how they are shown and kept: progress, metrics.jsonl, TensorBoard, alerts, times, traces.

It may import ``train.run`` and ``train.objectives``; the loop imports it.
"""
