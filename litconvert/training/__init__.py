"""The training loop, whatever is trained: engine, optimisers, fitting, what is looked at meanwhile."""
