"""sora_train: text-to-video diffusion transformers (Latte, arXiv 2401.03048), trained on Ray with DeepSpeed ZeRO.

Every tensor annotation and every einops string uses these axes:

    b    batch                      f    latent frames
    c    latent channels            h w  latent height and width
    o    output channels: c, or 2c with a learned variance
    p    patch side; einops tells its two sides apart as ph pw, of the h w patches of a frame
    n    tokens of a frame          d    width of the model
    g s  groups, tokens of a group  m k  attention heads, width of a head
    l    text tokens                e    width of the text embeddings
    r    rotary frequencies, k/2    i    anything that is counted
    F H W  frames and pixels

`t` is diffusion time, never frames. Axes that are joined are written together: `bg`, `ppo`. A number in words, such
as `six`, splits an axis into parts.
"""

import logging
import os

os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
"""Ray must not start by itself. A thread that outlives `ray.shutdown` would start a new Ray with its next call, in
the middle of our own `ray.init` ("called ray.init twice", or a deadlock). Ray reads this when it is imported."""

for _name in ("torchao", "torch.utils._pytree"):  # torchao's import, also by peft, warns of libraries for other devices
    logging.getLogger(_name).setLevel(logging.ERROR)

__version__ = "0.1.0"
