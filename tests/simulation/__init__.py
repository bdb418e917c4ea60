"""The simulation: the services' own code over in-memory servers, in virtual time."""
