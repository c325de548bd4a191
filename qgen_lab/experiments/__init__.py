"""Stored experiments and the statistics that the chapters share."""
