"""Drawing samples, captions for them, and pictures of them."""
