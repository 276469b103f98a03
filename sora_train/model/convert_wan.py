"""Names and settings of Wan in diffusers: `WanTransformer3DModel` of Wan 2.1 T2V and Wan 2.2 TI2V.

Query, key and value maps are one matrix here and three there, and the patch map is a convolution there.
"""

from collections.abc import Iterator
from typing import Any

from sora_train.model.config import ModelConfig
from sora_train.model.embed import TIME_CHANNELS

CLASS = "WanTransformer3DModel"
SAME = {
    "freq_dim": TIME_CHANNELS,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}
"""Settings of every text-to-video Wan, and diffusers' defaults."""


def wan_names(depth: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Pairs of a module or table here and its counterparts in diffusers, stacked in this order."""
    embedder = "condition_embedder"
    yield "patch_in", ("patch_embedding",)
    yield "time.fc1", (f"{embedder}.time_embedder.linear_1",)
    yield "time.fc2", (f"{embedder}.time_embedder.linear_2",)
    yield "time_to_blocks", (f"{embedder}.time_proj",)
    yield "text.fc1", (f"{embedder}.text_embedder.linear_1",)
    yield "text.fc2", (f"{embedder}.text_embedder.linear_2",)
    yield "patch_out", ("proj_out",)
    yield "table_out", ("scale_shift_table",)
    for i in range(depth):
        block = f"blocks.{i}"
        yield f"{block}.table", (f"{block}.scale_shift_table",)
        yield f"{block}.attention.qkv", tuple(f"{block}.attn1.to_{letter}" for letter in "qkv")
        yield f"{block}.text_norm", (f"{block}.norm2",)
        yield f"{block}.text_attention.q", (f"{block}.attn2.to_q",)
        yield f"{block}.text_attention.kv", (f"{block}.attn2.to_k", f"{block}.attn2.to_v")
        for ours, theirs in (("attention", "attn1"), ("text_attention", "attn2")):
            yield f"{block}.{ours}.norm_q", (f"{block}.{theirs}.norm_q",)
            yield f"{block}.{ours}.norm_k", (f"{block}.{theirs}.norm_k",)
            yield f"{block}.{ours}.out", (f"{block}.{theirs}.to_out.0",)
        yield f"{block}.feed_forward.fc1", (f"{block}.ffn.net.0.proj",)
        yield f"{block}.feed_forward.fc2", (f"{block}.ffn.net.2",)


def wan_config(settings: dict[str, Any]) -> ModelConfig:
    """The model config of a text-to-video Wan. Raises ValueError for settings without a counterpart."""
    for key, value in SAME.items():
        if settings.get(key, value) != value:
            raise ValueError(f"{key} is {settings[key]!r}; only {value!r}, of a text-to-video Wan, can be read")
    channels, out = settings["in_channels"], settings.get("out_channels")
    if out not in (None, channels):
        raise ValueError(
            f"in_channels is {channels} and out_channels is {out}: the model takes a condition next to the latents, "
            "such as an image. Use the weights of a text-to-video Wan"
        )
    time, *sides = settings["patch_size"]
    if time != 1 or len(set(sides)) != 1:
        raise ValueError(f"patch_size is {settings['patch_size']}; only one frame of equal sides can be read")
    width = settings["num_attention_heads"] * settings["attention_head_dim"]
    return ModelConfig(
        family="wan",
        width=width,
        depth=settings["num_layers"],
        heads=settings["num_attention_heads"],
        feed_forward=settings["ffn_dim"],
        patch=sides[0],
        in_channels=channels,
        text_width=settings["text_dim"],
        norm_eps=settings.get("eps", 1e-6),
    )


def wan_settings(config: ModelConfig) -> dict[str, Any]:
    """diffusers' config.json of a Wan."""
    return {
        "_class_name": CLASS,
        **SAME,
        "patch_size": [1, config.patch, config.patch],
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "text_dim": config.text_width,
        "ffn_dim": config.inner_width,
        "num_layers": config.depth,
        "eps": config.norm_eps,
        "rope_max_seq_len": 1024,
    }
