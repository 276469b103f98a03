"""`sora bench`: how fast the parts are, beside what they could be. A file a subject; imports nothing by itself.

`model.py` and what it imports need torch, einops, safetensors and jaxtyping alone, so that it runs on a bare GPU
machine as `python -m sora_train.bench.model`; `data.py` and `checkpoint.py` need no Ray.
"""
