"""A run that takes a few seconds and can be killed at any of them. Started by test_resume.py: OUT."""

import sys
from pathlib import Path

import tiny

from efftrain.recipe import exit_cleanly

STEPS = 40

if __name__ == "__main__":
    with exit_cleanly():
        tiny.train(
            Path(sys.argv[1]),
            tiny.Walks(pause_s=0.02, spoil=(7, 23)),
            objective=tiny.nan_at_spoiled,
            steps=STEPS,
            checkpoint_every=2,
            eval_every=5,
            evaluate=lambda model: {"bpb": float(model.head.kernel[...].sum())},
            ema_decay=0.9,
        )
