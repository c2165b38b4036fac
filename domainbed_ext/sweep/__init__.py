"""Many runs: `python -m domainbed_ext.sweep launch|status|retry|validate|cancel|delete_incomplete`."""
