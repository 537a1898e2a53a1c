"""Measurements of a model's quality and cost; every figure says whether it was measured, counted or modelled."""
