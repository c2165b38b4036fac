"""One HTML page: tables, plots and every run."""
