"""Training on many processes: data, tensor and expert parallelism of any model of subquad, on `torch.distributed`."""
