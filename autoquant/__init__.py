"""Finds the best quantization recipe for a PyTorch model, layer by layer."""
