"""Video and image files: headers, time stamps, decoding, and the transforms that fit frames to a bucket."""
