"""What is known of each weight: its selection, schedule, gradient, and share among processes."""
