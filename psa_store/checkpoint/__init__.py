"""Versions of a job as a whole: kept under a name, compared, gone back to, forked, and written to files."""
