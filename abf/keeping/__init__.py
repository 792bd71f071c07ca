"""Copies of finished stage directories where nothing is purged, and what may be deleted."""
