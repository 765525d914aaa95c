"""Evaluators: each yields `(name, value)`; `report` makes one JSON and one table of them."""
