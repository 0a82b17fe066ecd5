"""What every measurement needs around it: machine, servers, client, metrics, models, outputs."""
