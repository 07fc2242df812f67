"""From logits to accepted tokens."""
