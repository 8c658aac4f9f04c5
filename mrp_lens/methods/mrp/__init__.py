"""MRP: where its directions start, how they are parameterised and trained, and the distillation of the robust variant."""
