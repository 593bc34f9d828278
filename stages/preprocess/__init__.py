"""Documents and questions in, samples out."""
