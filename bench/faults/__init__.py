"""Faults at jblock's own interfaces, drawn from a seed, and a load that notices what they do to answers."""
