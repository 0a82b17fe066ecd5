"""What can stand between or around real processes: the WAN proxy, step pacing."""
