"""What a model is trained on: functions from a batch to sums, and teachers that an objective reads.

It may import ``models`` and ``train.checkpoints``; it knows nothing of the loop.
"""
