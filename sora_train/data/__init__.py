"""Training data: the order of samples, the shard reader, the loader, and collation to tensors."""
