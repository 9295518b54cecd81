"""What lies on disk: reading it into a model, writing a model to it."""
