"""Videos and captions to shards of latents and embeddings, on Ray Data: `pipeline.prep(recipe)`."""
