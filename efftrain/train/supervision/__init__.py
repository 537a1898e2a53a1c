"""Supervision: what keeps a run going or ends it in order, by restarts, the watchdog and signals.

It may import ``train.metrics``, ``train.objectives``, ``train.state`` and ``train.step``; the loop imports it.
"""
