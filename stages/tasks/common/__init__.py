"""What tasks share: reading data, metrics, wording, and defaults for what few tasks have."""
