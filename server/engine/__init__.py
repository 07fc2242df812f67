"""The decoding engine: schedule, run the model, verify, emit, draft."""
