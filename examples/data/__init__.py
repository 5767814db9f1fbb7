"""Pictures to learn from, the order in which they are seen, and the files that hold them."""
