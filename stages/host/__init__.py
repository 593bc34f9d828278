"""Starts and watches stages on a host, as containers or local processes; checks and plans what they need."""
