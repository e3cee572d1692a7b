"""One agent: it keeps blocks resident on its devices and runs requests through them."""
