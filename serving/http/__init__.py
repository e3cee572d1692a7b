"""The OpenAI-compatible HTTP API, in the event loop of the gRPC server and on the same engine."""
