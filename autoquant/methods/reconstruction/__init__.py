"""How layers are learned together: each file registers the technique of its name."""
