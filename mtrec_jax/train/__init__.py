"""Training: losses, task balancing, the jitted step, the loop around it, checkpoints."""
