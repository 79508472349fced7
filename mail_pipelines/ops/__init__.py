"""Op jobs for what is no data set: maintenance, later provisioning and retirement."""
