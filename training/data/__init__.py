"""Prompts and answers: files, data sets, the distilled format, documents."""
