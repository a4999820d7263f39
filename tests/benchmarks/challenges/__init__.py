"""The problems of training through quantizers, each shown on a real model, with its remedy."""
