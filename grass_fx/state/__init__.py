"""State of each weight: its selection, schedule and gradient, and how processes share it."""
