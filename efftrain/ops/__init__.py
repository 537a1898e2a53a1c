"""Pure functions on arrays, one formula each."""
