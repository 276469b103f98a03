"""sora_train: text-to-video diffusion transformers (Latte, arXiv 2401.03048), trained on Ray with DeepSpeed ZeRO.

One alphabet of axes serves every annotation and every einops string:

    b  batch            f  latent frames     c  latent channels     h w  latent height and width
    p  patch side       n  tokens of one frame                      d    model width
    k  head width       l  text tokens       e  text width          F H W  frames and pixels

`t` is only ever diffusion time, never frames.
"""

__version__ = "0.1.0"
