"""The benches, one module each: its options, its result and `run`."""
