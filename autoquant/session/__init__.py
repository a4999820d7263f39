"""One opened model with its task and data: prepared, checked, priced, ready to take recipes."""
