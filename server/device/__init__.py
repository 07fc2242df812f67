"""The devices that models run on: what depends on them, and which there are."""
