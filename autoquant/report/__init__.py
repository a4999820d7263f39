"""Tables for people: compute first, then draw."""
