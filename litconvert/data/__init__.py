"""Training data: where it comes from, how it is kept, and how batches are drawn from it."""
