"""The training loop, which knows no method: steps, processes, state, metrics."""
