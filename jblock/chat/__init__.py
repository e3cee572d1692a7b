"""Chat: from messages to the text that an instruct model was trained on."""
