"""Starts and watches stages on a host, in containers or as local processes; checks and plans what they need."""
