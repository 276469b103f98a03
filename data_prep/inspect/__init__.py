"""`sora inspect`: what shards hold, as counts and as a page."""
