"""Training: an objective, a state, one jitted step, one loop."""
