"""Reads finished runs: the ledger, comparisons of runs, summaries of data sets."""
