"""Training a model on a task with Hugging Face's Trainer, under the settings of a preset."""
