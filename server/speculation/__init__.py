"""Draft sources, the trees that are made of their drafts, and what those cost."""
