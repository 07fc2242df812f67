"""Request and response bodies, after OpenAI's API reference."""
