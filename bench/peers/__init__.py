"""Other engines on the same work. Each driver runs in its own engine's environment, which has neither
jax nor this project's packages, so what the drivers share (`load`) needs the standard library alone."""
