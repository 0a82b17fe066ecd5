"""One request's life, read from the event logs of a target and a drafter and shown as a page or a Chrome trace."""
