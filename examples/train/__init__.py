"""Training of the demo family: texts, tasks, a small Llama, and the writers of its checkpoints."""
