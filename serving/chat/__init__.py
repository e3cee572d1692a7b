"""Chats with instruct models: templates rendered where they can be stopped, and tool calls read back."""
