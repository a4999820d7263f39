"""Kinds of files that a quantized model can be exported to, one a module."""
