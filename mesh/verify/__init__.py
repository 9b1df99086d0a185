"""`mesh verify`: is an endpoint what OpenAI's clients take it for, and does it fail well?

A module for each group of checks; `endpoint.py` asks, `events.py` and `objects.py` read what comes.
"""
