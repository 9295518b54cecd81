"""Formats of other libraries, one file each: how it is told, read and written."""
