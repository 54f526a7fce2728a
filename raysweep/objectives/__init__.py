"""Training objectives: what is hidden or corrupted, what is predicted, and the loss of it."""
