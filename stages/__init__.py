"""The four stages of Lorry and what they share. Start at `contract`, then any stage's `stage.py`."""
