"""What a model is worth and what it costs: measured, or counted and called so."""
