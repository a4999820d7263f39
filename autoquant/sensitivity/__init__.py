"""What each choice of each layer does to the model, estimated before any trial."""
