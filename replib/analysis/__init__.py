"""Measures of trained networks and statistics over seeds."""
