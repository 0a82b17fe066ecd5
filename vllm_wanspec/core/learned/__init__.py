"""What is learned while serving: calibration, step times, yields."""
