"""Base models: where they come from, which kinds are supported, how they are loaded."""
