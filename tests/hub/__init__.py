"""A Hugging Face Hub that is small enough to run in a test: real HTTP, repositories on disk, and faults on request."""
