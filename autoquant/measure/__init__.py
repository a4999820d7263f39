"""How good and how large a candidate is."""
