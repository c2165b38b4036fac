"""From the records of many runs to scores, tables, plots and a page. Nothing here loads torch."""
