"""Training: one loop, two tasks. Data, optimizer, step, checkpoints and metrics are modules of their own."""
