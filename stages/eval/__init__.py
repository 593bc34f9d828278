"""Samples and predictions in, scores with their intervals and a report out."""
