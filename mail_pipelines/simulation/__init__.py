"""Weeks of a large fleet, simulated: the planning code of production in a world of arrays that blocks, slows down and loses servers."""
