"""Which clips make a batch, how shards are read, and how clips become tensors."""
