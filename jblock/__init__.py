"""jblock serves many fine-tuned language models by storing and running them as shared blocks."""
