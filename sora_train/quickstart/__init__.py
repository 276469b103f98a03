"""The quickstart: captioned clips of moving shapes, and an oracle that reads them."""
