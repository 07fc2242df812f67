"""The paged KV cache: block bookkeeping and tensors."""
