"""`sora prep --plan`: estimates clips, steps, bytes and hours from headers and a measured sample."""
