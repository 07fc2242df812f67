"""CUDA GPUs; models run there as `transformers` and torch compute them."""
