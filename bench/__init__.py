"""Benches: each command measures one promise and ends in one JSON object on stdout.

May import every other package; nothing imports it.
"""
