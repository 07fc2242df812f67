"""The training loop, whatever it trains: steps, processes, state, metrics."""
