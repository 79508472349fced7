"""How much each server may send to each provider, and how that is split into allotments."""
