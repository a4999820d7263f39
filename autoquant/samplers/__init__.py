"""Where the next recipe comes from."""
