"""Training on many processes: data, tensor and expert parallelism of subquad's models, on `torch.distributed`."""
