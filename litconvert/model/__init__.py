"""The model and its pipelines, which are shipped beside weights, and what is known of them without weights."""
