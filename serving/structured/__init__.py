"""Answers that keep to a schema, a regular expression, a choice or a grammar."""
