"""Training through quantizers: weights, scales and biases of a recipe, learned by gradients."""
