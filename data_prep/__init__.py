"""Videos and captions to shards of latents and embeddings, on Ray Data: `pipeline.prep(recipe)`.

`sources` reads the captions (`captions`, `csv_records`) and looks up the files; `resume` finds what is left to encode;
`ray_pipeline` sends it through the `stages` (decode by `video/`, VAE, text encoder) under a `watchdog`; `sink` removes
duplicates and writes `shards`, with counts in `stats`. To add a filter for clips, see `filters`; to add a column to the
shards, see `schemas`. `estimate/` is `sora prep --plan`, `inspect/` is `sora inspect`.
"""
