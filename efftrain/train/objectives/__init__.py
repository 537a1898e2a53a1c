"""Objectives, which define the loss that training minimises, and the teachers that objectives read.

It may import ``models`` and ``train.checkpoints``, and must not depend on the loop.
"""
