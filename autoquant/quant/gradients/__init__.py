"""Gradients of few bits: how they are rounded, and how well estimates agree with what they mean."""
