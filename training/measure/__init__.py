"""What heads are worth on answers that they were not trained on."""
