"""How good a model is: scores, and what each layer costs and loses."""
