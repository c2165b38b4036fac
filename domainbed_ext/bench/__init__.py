"""What the benchmark itself costs: `python -m domainbed_ext.bench`."""
