"""Attention over the paged KV cache with draft trees."""
