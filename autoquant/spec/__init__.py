"""What a recipe and a search space say: frozen values, free of torch."""
