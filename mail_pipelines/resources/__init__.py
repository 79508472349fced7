"""One `ConfigurableResource` for each outside thing that assets, ops and sensors need."""
