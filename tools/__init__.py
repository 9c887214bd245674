"""Readers of a run's folder OUT: the report page and the tour of one prompt. No script imports them."""
