"""Search spaces that come with autoquant, as YAML files."""
