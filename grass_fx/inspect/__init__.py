"""What users see of their model before and while it trains: explain, plan, coverage_plot."""
