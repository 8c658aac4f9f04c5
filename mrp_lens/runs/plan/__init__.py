"""Planning: what a fit will need."""
