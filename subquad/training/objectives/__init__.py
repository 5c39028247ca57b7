"""What a model is trained to do with task data: one class for each objective."""
