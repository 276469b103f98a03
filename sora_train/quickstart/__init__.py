"""The embedded default: captioned clips of moving shapes, and a judge that reads them back from pixels."""
