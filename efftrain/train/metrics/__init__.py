"""What a run shows and keeps of itself: progress, metrics.jsonl, TensorBoard, alerts, times, traces.

It may import ``train.run``; the loop imports it.
"""
