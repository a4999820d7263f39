"""How gradients pass a quantizer: each file registers the estimator of its name."""
