"""What quantization means: pure tensor functions."""
