"""The draft side: trees, candidates, acceptance rules and draft heads, in pure torch."""
