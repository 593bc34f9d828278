"""What reads finished runs: the ledger, comparisons, summaries of data sets."""
