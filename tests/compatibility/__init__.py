"""Whether releases work with libraries that the pipeline itself does not run with."""
