"""What is asked: prompts, conversations played turn by turn, and what came of each request."""
