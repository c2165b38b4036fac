"""Files, processes, terminals and locks: what every part needs and no part owns. Nothing here loads torch."""
