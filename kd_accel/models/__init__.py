"""Towers, student, frozen teacher, and the release directory that open_clip loads."""
