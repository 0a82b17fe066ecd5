"""What can be worked out without running anything: bounds and closed forms."""
