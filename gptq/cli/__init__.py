"""The command lines: their flags, what they print, and the page of a report.

Nothing below imports it; it holds no arithmetic and no file format.
"""
