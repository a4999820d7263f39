"""A search from beginning to end, and the resumption of one."""
