"""Choosing one option for each site within budgets: exact, and independent of what it is for."""
