"""The one training loop, its optimizers, losses and checkpoints."""
