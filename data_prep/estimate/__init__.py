"""`sora prep --plan`: what there would be, from headers and a measured sample."""
