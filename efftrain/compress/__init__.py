"""What makes a trained model smaller: each returns the new model and a report of what changed and what did not."""
