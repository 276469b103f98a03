"""`sora bench`: speed and memory of the model, data, prep, training, checkpoints and validation.

`model.py` and what it imports need only torch, einops, safetensors and jaxtyping, so it runs on a bare GPU machine as
`python -m sora_train.bench.model`. `data.py` and `checkpoint.py` don't need Ray.
"""
