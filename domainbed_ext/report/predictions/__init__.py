"""What follows from the predictions of runs: a module for each analysis, and what they share."""
