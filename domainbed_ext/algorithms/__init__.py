"""The methods, as DomainBed algorithms."""
