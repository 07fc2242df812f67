"""The base model's hidden states: computed, kept on disk, put into batches."""
