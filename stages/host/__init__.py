"""What starts and watches stages on a host: cards, containers, local processes, checks, plans."""
