"""Traced graphs in other operators and types: functions of one graph, and what they are made of."""
