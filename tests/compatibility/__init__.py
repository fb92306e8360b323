"""Check that releases work with library versions that the pipeline itself does not use."""
