"""Grammars that answers keep to: what each may go on with, told by a process beside the engine's."""
