"""Tools to look at a model before and during training: explain, plan and coverage_plot."""
