"""What text costs."""
