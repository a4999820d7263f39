"""The default sampler: each proposal solves a knapsack over a table that the trials correct."""
