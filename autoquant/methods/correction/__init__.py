"""What is done for the errors of rounded weights: each file registers the technique of its name."""
