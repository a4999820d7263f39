"""Sites in a model, quantized layers, and the conversion between recipe and module."""
