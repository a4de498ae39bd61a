"""The owner: cutting a model, fronts and heads, the trainer, the link to a node."""
