"""Integer arithmetic on a CPU: our own quantization of activations, oneDNN's integer products."""
