"""An invented pair of models, and drafters that need no real one."""
