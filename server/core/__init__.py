"""A request and its state: what every part of the engine speaks about."""
