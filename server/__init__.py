"""The inference server: engine, models, HTTP API and command line."""
